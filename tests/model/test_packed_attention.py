"""Packed rows: every document is computed as if it was alone, and nothing flows from one to another."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from tests.method.shapes import FAMILIES, config_of
from winnow.data.encoding import Encoded, collate
from winnow.model.packed_attention import _varlen, attention, packed
from winnow.training.student import Student

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


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float | None, left: int
) -> torch.Tensor:
    """Causal attention [T, H, D] inside each document, of as many key and value heads as query heads, one score at a time."""
    scores_htt = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    position = torch.arange(len(query))
    document_t = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    distance_tt = position[:, None] - position[None]
    seen_tt = (document_t[:, None] == document_t[None]) & (distance_tt >= 0)
    if left >= 0:
        seen_tt &= distance_tt <= left
    return torch.einsum("hqk,khd->qhd", scores_htt.masked_fill(~seen_tt, float("-inf")).softmax(-1), value)


def varlen_attn_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """With the signature of torch 2.11, which knows no groups of heads."""
    assert query.shape == key.shape == value.shape
    assert cu_seq_q.tolist() == cu_seq_k.tolist() and max_q == max_k == int(cu_seq_q.diff().max())
    assert window_size[1] == 0
    return plain(query, key, value, cu_seq_q.tolist(), scale, window_size[0])


def varlen_attn_2_12(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """With the signature since torch 2.12, which shares heads itself where it is told to."""
    assert enable_gqa or query.shape == key.shape
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return varlen_attn_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size
    )


@pytest.mark.parametrize("function", [varlen_attn_2_11, varlen_attn_2_12])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_variable_length_attention_of_each_torch_gives_what_the_plain_one_gives(
    function: Any, window: int | None, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    row = [torch.randn(1, heads, sum(LENGTHS), 16, requires_grad=True) for heads in (8, key_heads, key_heads)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    monkeypatch.setattr(varlen, "varlen_attn", function)
    fast = _varlen(*(x[0].transpose(0, 1) for x in row), bounds, max(LENGTHS), 0.3, window)
    expected = attention(torch.nn.Module(), *row, None, scaling=0.3, sliding_window=window, cu_seqlens=bounds)[0][0]
    torch.testing.assert_close(fast, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weights).sum(), row) for x in (fast, expected)]
    torch.testing.assert_close(*gradients)


def test_the_installed_torch_has_one_of_these_signatures() -> None:
    parameters = inspect.signature(varlen.varlen_attn).parameters
    older = inspect.signature(varlen_attn_2_11).parameters
    assert list(parameters)[: len(older)] == list(older)
    assert len(parameters) == len(older) or "enable_gqa" in parameters
