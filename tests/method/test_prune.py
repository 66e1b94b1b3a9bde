"""Pruning against plain references written as loops, and what must hold of any mask."""

from __future__ import annotations

import pytest
import torch

from winnow.method.prune import Magnitude, Wanda, smallest, smallest_of_pattern
from winnow.model.load import pretrained
from winnow.model.packing import linears
from winnow.types import UserError


def reference_rows(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        for j in order[: round(len(row) * sparsity)]:
            mask[i, j] = True
    return mask


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_smallest_is_the_plain_ranking(sparsity: float) -> None:
    score = torch.rand(5, 40)
    score[0, :] = 1.0  # ties are broken by position
    assert torch.equal(smallest(score, sparsity), reference_rows(score, sparsity))


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8)])
def test_patterns_zero_exactly_half_of_every_group(pattern: str, group: int) -> None:
    score = torch.rand(6, 32)
    mask = smallest_of_pattern(score, pattern)
    assert torch.equal(mask, reference_rows(score.view(-1, group), 0.5).view_as(mask))
    assert (mask.view(-1, group).sum(-1) == group // 2).all()


def test_patterns_need_a_width_they_divide() -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        smallest_of_pattern(torch.rand(2, 12), "4:8")


def test_a_pattern_fixes_the_sparsity() -> None:
    with pytest.raises(UserError, match=r"sparsity=0\.3 clashes with .*pattern=2:4"):
        Wanda(sparsity=0.3, pattern="2:4")


@pytest.mark.parametrize("stage", [Magnitude(0.4), Wanda(0.4), Magnitude(pattern="2:4"), Wanda(pattern="4:8")])
def test_every_matrix_of_the_blocks_reaches_the_sparsity(tiny, run_in, stage) -> None:
    lm = pretrained(str(tiny))
    embeddings = lm.model.get_input_embeddings().weight.clone()
    pruned = stage(lm, run_in).model
    for name, linear in linears(pruned).items():
        zeros = (linear.weight == 0).float().mean().item()
        wanted = 0.4 if stage.pattern == "unstructured" else 0.5
        assert zeros == pytest.approx(wanted, abs=0.01), name
    assert torch.equal(pruned.get_input_embeddings().weight, embeddings)


def test_wanda_scores_by_the_norms_that_reach_each_layer(tiny, run_in) -> None:
    """The first block's query projection against eq. 1 of the paper, computed from a plain forward with a hook."""
    from winnow.model.calibration import calibration_batches

    lm = pretrained(str(tiny))
    query = lm.model.model.layers[0].self_attn.q_proj
    seen = []
    handle = query.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).float()))
    batches, _ = calibration_batches(lm, run_in)
    with torch.no_grad():
        for batch in batches:
            lm.model(input_ids=batch)
    handle.remove()
    norm = torch.cat(seen).norm(dim=0)
    mask = reference_rows(query.weight.abs().float() * norm, 0.5)
    expected = query.weight.masked_fill(mask, 0)
    pruned = Wanda(0.5)(lm, run_in).model.model.layers[0].self_attn.q_proj.weight
    assert (pruned != expected).float().mean() < 0.001  # sums in another order may flip a near tie
