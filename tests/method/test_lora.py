"""LoRA recovery: it trains, it merges what the adapter computed, and on a pruned model every zero stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from winnow.core.errors import UserError
from winnow.estimate.layout import layout_of
from winnow.method.lora import Lora, add_adapters, layers, mask_zeros, merge
from winnow.method.prune import Wanda
from winnow.model.layers import linears
from winnow.model.pretrained import pretrained


def with_update(base: Any, seed: int = 1, **knobs: Any) -> Any:
    """A model with adapters that are not zero, and DoRA's lengths away from where they start."""
    model = add_adapters(base.float(), Lora(rank=4, **knobs), 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_survive_and_the_loss_falls(pattern: str, dora: bool, tiny, run_in) -> None:
    pruned = Wanda(pattern=pattern)(pretrained(str(tiny)), run_in).lm
    masks = {n: m.weight.data != 0 for n, m in linears(pruned.model).items()}
    before = {n: m.weight.data.clone() for n, m in linears(pruned.model).items()}
    knobs = {"rank": 8, "tokens_per_batch": 512, "learning_rate": 0.02, "held_out": 8}
    recovered, notes = Lora(steps=30, dora=dora, **knobs)(pruned, run_in)
    training = notes["training"]
    assert training["held_out_loss"] < training["held_out_loss_before"] - 0.1
    for name, linear in linears(recovered.model).items():
        assert torch.equal(linear.weight != 0, masks[name]), name
        assert not torch.equal(linear.weight, before[name]), name
        if pattern == "2:4":
            assert (linear.weight.unflatten(-1, (-1, 4)) == 0).sum(-1).eq(2).all(), name
    assert recovered.model.dtype == torch.bfloat16
    assert not any("lora" in name for name, _ in recovered.model.named_parameters())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True, "alpha": 3.0}])
def test_what_is_merged_is_what_was_trained(knobs: dict[str, Any], sparse: bool, tiny, run_in) -> None:
    base = pretrained(str(tiny))
    if sparse:
        base = Wanda(0.5)(base, run_in).lm
    plain = logits(base.model.float())
    model = with_update(base.model, **knobs)
    mask_zeros(model)
    with_adapter = logits(model)
    assert (with_adapter - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(merge(model)), with_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "scale"), [({}, 2.0), ({"alpha": 12.0}, 3.0), ({"alpha": 12.0, "rslora": True}, 6.0)]
)
def test_the_merged_weight_is_the_formulas(knobs: dict[str, Any], scale: float, tiny) -> None:
    """W + s B A with s = alpha / rank, or alpha / sqrt(rank); rank 4, alpha twice that unless given."""
    name = "model.layers.0.mlp.up_proj"
    model = with_update(pretrained(str(tiny)).model, **knobs)
    layer = layers(model)[name]
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (layer.base_layer.weight + scale * update).detach()
    torch.testing.assert_close(linears(merge(model))[name].weight, expected)


def test_doras_rows_have_the_trained_lengths(tiny) -> None:
    name = "model.layers.1.self_attn.q_proj"
    model = with_update(pretrained(str(tiny)).model, dora=True)
    lengths = layers(model)[name].lora_magnitude_vector["default"].weight.detach().clone()
    torch.testing.assert_close(linears(merge(model))[name].weight.norm(dim=1), lengths)


def test_the_masked_layer_is_the_masked_update(tiny, run_in) -> None:
    """Against the plain reference: base weight plus mask times scaled B A, as a dense layer."""
    base = Wanda(0.5)(pretrained(str(tiny)), run_in).lm.model
    model = with_update(base)
    mask_zeros(model)
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 64)
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = layer.base_layer.weight + (layer.base_layer.weight != 0) * update
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_targets_choose_layers(tiny, run_in) -> None:
    lm = pretrained(str(tiny))
    before = {n: m.weight.data.clone() for n, m in linears(lm.model).items()}
    knobs = {"rank": 4, "steps": 2, "tokens_per_batch": 128, "learning_rate": 0.02}
    after = Lora(targets=["q_proj", "layers.1.mlp.up_proj"], **knobs)(lm, run_in).lm
    changed = {n for n, m in linears(after.model).items() if not torch.equal(m.weight, before[n])}
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert changed == expected


def test_targets_that_match_nothing_name_what_there_is(tiny) -> None:
    plan = layout_of(pretrained(str(tiny)))
    with pytest.raises(
        UserError, match=r"method\.lora\.targets: c_attn, lm_head is no linear layer.*there are down_proj.*v_proj"
    ):
        Lora(targets=["c_attn", "q_proj", "lm_head"]).predict(plan)
    assert len(Lora().target_shapes(plan)) == 14
