"""Packed rows: every document is computed as if it was alone, and nothing flows from one to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.method.shapes import FAMILIES, config_of
from winnow.recovery.attention import packed
from winnow.recovery.encoding import Encoded, collate
from winnow.recovery.student import Student

LENGTHS = (11, 1, 23, 6)
SLIDING = {"gemma3_text", "mistral", "gemma2"}


def model_of(family: str) -> Any:
    """In single precision, with windows shorter than documents; Gemma-2's softcaps bite."""
    from transformers import AutoModelForCausalLM

    changes: dict[str, Any] = {"dtype": "float32", "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    if family in SLIDING:
        changes |= {"sliding_window": 5}
    if family == "gemma2":
        changes |= {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
        changes |= {"layer_types": ["sliding_attention", "full_attention"], "attn_implementation": "eager"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def documents() -> list[Encoded]:
    torch.manual_seed(1)
    return [Encoded(torch.randint(5, 1000, (length,)).tolist(), ((1, length),)) for length in LENGTHS]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_a_document_in_a_row_has_the_logits_it_has_alone(family: str) -> None:
    model = model_of(family)
    student = Student(model)
    assert student.packs
    rows = documents()
    with torch.inference_mode():
        together = student.head(student(collate(rows))[0])
        alone = torch.cat([model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0] for row in rows])
        wrong = model(input_ids=collate(rows)["input_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (wrong - alone).abs().max() > 0.01  # the test would see it


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_no_gradient_crosses_a_boundary(family: str) -> None:
    model = model_of(family)
    batch = collate(documents())
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with packed(model):
        hidden = model.get_decoder()(
            inputs_embeds=embedded,
            position_ids=batch["position_ids"],
            cu_seqlens=batch["cu_seqlens"],
            use_cache=False,
        ).last_hidden_state
    first, last = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    hidden[0, first:last].square().sum().backward()
    grad = embedded.grad[0]
    assert (grad[:first] == 0).all() and (grad[last:] == 0).all()
    assert (grad[first:last].abs().sum(-1) > 0).all()


def test_afterwards_the_model_attends_as_before() -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), packed(model):
        assert model.config._attn_implementation != before
        raise KeyError
    assert model.config._attn_implementation == before
