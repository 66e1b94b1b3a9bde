"""Low-rank updates in few passes: what PEFT computes, in single precision and in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.test_packed_attention import model_of
from winnow.method.lora import Lora, add_adapters, layers, mask_zeros
from winnow.training import low_rank

IDS = torch.arange(3, 27).reshape(2, 12)


def trained_a_little(model: Any) -> Any:
    """Second factors begin at zero, and would hide the first."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers(model).values():
        layer.lora_B["default"].weight.data.normal_(0, 0.1, generator=generator)
    return model


def outcome(model: Any, in_16_bits: bool = False) -> dict[str, torch.Tensor]:
    """Logits, and a gradient for each trained weight and the embedded words."""
    model.zero_grad()
    words = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_16_bits):
        logits = model(inputs_embeds=words, use_cache=False).logits.float()
    logits.log_softmax(-1)[..., 5].sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "words": words.grad, **found}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("in_16_bits", [False, True])
def test_they_are_what_peft_computes(in_16_bits: bool, checkpointing: bool) -> None:
    model = trained_a_little(add_adapters(model_of("llama"), Lora(rank=4), 0))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    exact = outcome(model)
    expected = outcome(model, in_16_bits)
    with low_rank.fused_lora(model):
        found = outcome(model, in_16_bits)
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * len(layers(model))
    for name, value in found.items():
        if in_16_bits:  # as far from the truth as PEFT is, about
            scale = exact[name].norm()
            assert (value - exact[name]).norm() < 1.5 * (expected[name] - exact[name]).norm() + 1e-3 * scale, name
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_layers_are_afterwards_as_they_were() -> None:
    model = add_adapters(model_of("llama"), Lora(rank=4), 0)
    with pytest.raises(KeyError), low_rank.fused_lora(model):
        assert all("forward" in vars(layer) for layer in layers(model).values())
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers(model).values())


def test_dora_and_pruned_layers_keep_their_own_way() -> None:
    dora = add_adapters(model_of("llama"), Lora(rank=4, dora=True), 0)
    pruned = model_of("llama")
    for name, weight in pruned.named_parameters():
        if name.endswith("q_proj.weight"):
            weight.data[:, ::2] = 0
    masked = add_adapters(pruned, Lora(rank=4), 0)
    mask_zeros(masked)
    before = {name: vars(layer).get("forward") for name, layer in layers(masked).items()}
    with low_rank.fused_lora(dora), low_rank.fused_lora(masked):
        assert not any("forward" in vars(layer) for layer in layers(dora).values())
        for name, layer in layers(masked).items():
            if name.endswith("q_proj"):
                assert layer.forward is before[name] is not None
            else:
                assert "forward" in vars(layer)


def test_a_layer_without_an_adapter_is_let_be() -> None:
    model = model_of("llama")
    with low_rank.fused_lora(model):
        assert not any("forward" in vars(module) for module in model.modules())
