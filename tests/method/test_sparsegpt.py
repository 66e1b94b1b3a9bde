"""SparseGPT against the optimal brain surgeon written plainly: a new inverse for every column."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from winnow.core.errors import UserError
from winnow.method.masks import smallest_of_all, smallest_of_pattern
from winnow.method.prune import Wanda
from winnow.method.sparsegpt import SparseGPT, inverse_factor, prune_columns
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained


def problem(rows: int = 6, width: int = 32, tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [out, in], correlated inputs [tokens, in], and the sum of their outer products."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), x, x.T @ x


def plain(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float, sparsity: float, pattern: str, block: int
) -> torch.Tensor:
    """Algorithm 1 in double precision, column by column, with eq. 2 and eq. 3 on the inverse of what is left of H."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    width = weight.shape[1]
    step = block if pattern == "unstructured" else int(pattern.split(":")[1])
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(width):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % step == 0:
            errors = [torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + step)]
            score = weight[:, j : j + step].square() / torch.stack(errors)
            chosen = (
                smallest_of_all(score, sparsity) if pattern == "unstructured" else smallest_of_pattern(score, pattern)
            )
            mask[:, j : j + step] = chosen
        for i in range(len(weight)):
            if mask[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0]
    return weight.masked_fill(mask, 0)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_it_is_the_plain_surgeon(pattern: str, block_size: int) -> None:
    weight, _, hessian = problem()
    dead = torch.zeros(32, dtype=torch.bool)
    pruned = prune_columns(weight, inverse_factor(hessian, 0.01, "it"), dead, 0.5, pattern, block_size)
    expected = plain(weight, hessian, 0.01, 0.5, pattern, block_size)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


def test_updates_make_up_for_much_of_what_is_lost() -> None:
    weight, x, hessian = problem(rows=64, width=64, tokens=400)
    pruned = prune_columns(weight, inverse_factor(hessian, 0.01, "it"), torch.zeros(64).bool(), 0.5, "unstructured", 32)
    masked = weight.masked_fill(pruned == 0, 0)
    lost, left = ((w - weight) @ x.T for w in (masked, pruned))
    assert left.square().sum() < 0.75 * lost.square().sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.333, 0.7, 0.95])
def test_shares_of_blocks_add_up(sparsity: float) -> None:
    weight, _, hessian = problem(rows=5, width=40)
    pruned = prune_columns(
        weight, inverse_factor(hessian, 0.01, "it"), torch.zeros(40).bool(), sparsity, "unstructured", 16
    )
    assert (pruned == 0).sum() == round(5 * 40 * sparsity)
    if sparsity == 0:
        assert torch.equal(pruned, weight)


def test_inputs_that_are_always_zero_go_first_and_disturb_nothing() -> None:
    weight, x, _ = problem()
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 4, 17]] = True
    hessian = (x * ~dead).T @ (x * ~dead)
    pruned = prune_columns(weight, inverse_factor(hessian, 0.01, "it"), dead, 0.5, "unstructured", 32)
    assert (pruned[:, dead] == 0).all()
    assert (pruned == 0).sum() == 6 * 32 / 2
    # the other columns are as if the dead ones had never been; theirs are 96 - 18 of the zeros
    small = hessian[~dead][:, ~dead]
    alone = prune_columns(
        weight[:, ~dead], inverse_factor(small, 0.01, "it"), dead[~dead], 78 / 174, "unstructured", 32
    )
    torch.testing.assert_close(pruned[:, ~dead], alone, rtol=1e-4, atol=1e-5)
    # nothing is known of any input: by magnitude
    nothing = torch.zeros(32, 32)
    pruned = prune_columns(weight, inverse_factor(nothing, 0.01, "it"), torch.zeros(32).bool(), 0.5, "2:4", 32)
    assert torch.equal(pruned, weight.masked_fill(smallest_of_pattern(weight.abs(), "2:4"), 0))


def test_a_hessian_that_is_hard_to_invert_gets_more_damping() -> None:
    x = torch.randn(2, 64)
    hessian = x.T @ x
    hessian.diagonal().sub_(0.002 * hessian.diagonal().mean())  # rounding may leave it indefinite
    assert inverse_factor(hessian, 0.001, "it").isfinite().all()
    with pytest.raises(UserError, match=r"inputs of model\.layers\.0\.mlp cannot be inverted, even with damping=10;"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, "model.layers.0.mlp")
    with pytest.raises(UserError, match="cannot be inverted"):
        inverse_factor(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01, "it")


def test_a_layer_whose_inputs_are_not_finite_is_named(tiny: Path, run_in) -> None:
    lm = pretrained(str(tiny))
    lm.model.model.layers[1].post_attention_layernorm.weight.data[5] = float("inf")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.(gate|down)_proj cannot be inverted"):
        SparseGPT()(lm, run_in)


@torch.inference_mode()
def test_it_keeps_the_embedded_model_closer_to_itself_than_wanda(run_in) -> None:
    base = trained()
    ids = base.tokenizer(["Question: Tom has 5 apples. Tom buys 7 more. How many?"], return_tensors="pt").input_ids
    wanted = base.model(input_ids=ids).logits.float()
    errors = {}
    for stage in (SparseGPT(pattern="2:4"), Wanda(pattern="2:4")):
        logits = stage(trained(), run_in).lm.model(input_ids=ids).logits.float()
        errors[stage.name] = (logits - wanted).square().mean().item()
    assert errors["sparsegpt"] < errors["wanda"]
