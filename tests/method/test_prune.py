"""Pruning against plain references written as loops, and what must hold of any mask and any allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import UserError
from winnow.estimate.layout import layout_of
from winnow.method import allocation, pipeline
from winnow.method.masks import smallest, smallest_of_all, smallest_of_pattern
from winnow.method.prune import Magnitude, Wanda
from winnow.method.sparsegpt import SparseGPT
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained

METHODS = (Magnitude, Wanda, SparseGPT)


def reference_rows(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The smallest of each row, the fractions of a weight carried over to the next row."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        for j in order[: round(len(row) * sparsity * (i + 1)) - round(len(row) * sparsity * i)]:
            mask[i, j] = True
    return mask


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.623, 0.95])
def test_smallest_is_the_plain_ranking(sparsity: float) -> None:
    score = torch.rand(5, 41)
    score[0, :] = 1.0  # ties are broken by position
    mask = smallest(score, sparsity)
    assert torch.equal(mask, reference_rows(score, sparsity))
    assert abs(mask.sum() - score.numel() * sparsity) <= 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.623, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smallest_of_all_is_the_plain_ranking(sparsity: float, dtype: torch.dtype) -> None:
    score = torch.rand(7, 31).mul(20).round().to(dtype)  # many ties
    assert torch.equal(smallest_of_all(score, sparsity), reference_rows(score.view(1, -1), sparsity).view_as(score))


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8)])
def test_patterns_zero_exactly_half_of_every_group(pattern: str, group: int) -> None:
    score = torch.rand(6, 32)
    mask = smallest_of_pattern(score, pattern)
    assert torch.equal(mask, reference_rows(score.view(-1, group), 0.5).view_as(mask))
    assert (mask.view(-1, group).sum(-1) == group // 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_clash_are_refused(method: Any) -> None:
    with pytest.raises(UserError, match=r"sparsity=0\.3 clashes with .*pattern=2:4"):
        method(sparsity=0.3, pattern="2:4")
    with pytest.raises(
        UserError, match=rf"method\.{method.__name__.lower()}\.allocation=owl clashes with .*pattern=4:8"
    ):
        method(pattern="4:8", allocation="owl")


@pytest.mark.parametrize("method", METHODS)
def test_a_width_that_the_pattern_does_not_divide_is_refused_first(method: Any, tmp_path: Path) -> None:
    lm = pretrained(str(random_model("llama", tmp_path / "odd", intermediate_size=132)))
    match = r"pattern=4:8 needs widths that are multiples of 8, and model\.layers\.0\.mlp\.down_proj has 132 inputs"
    with pytest.raises(UserError, match=match):
        method(pattern="4:8").predict(layout_of(lm))
    method(pattern="2:4").predict(layout_of(lm))


@pytest.mark.parametrize("stage", [m(pattern=p) for m in METHODS for p in ("2:4", "4:8")], ids=str)
def test_patterns_are_exact_in_every_layer(tiny: Path, run_in, stage: Any) -> None:
    for name, linear in linears(stage(pretrained(str(tiny)), run_in).lm.model).items():
        zeros, group = map(int, stage.pattern.split(":"))
        assert ((linear.weight == 0).view(-1, group).sum(-1) == zeros).all(), name


def zeros_of(lm: LM) -> tuple[int, int]:
    weights = [linear.weight for linear in linears(lm.model).values()]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@pytest.mark.parametrize("sparsity", [0.437, 0.7])
@pytest.mark.parametrize("chosen", ["uniform", "global", "owl"])
@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_met_over_all_weights(method: Any, chosen: str, sparsity: float, tiny: Path, run_in) -> None:
    lm = pretrained(str(tiny))
    weight = lm.model.model.layers[0].mlp.up_proj.weight.data  # so that blocks differ: larger, and with outliers
    weight *= 2
    weight[:, :3] *= 50
    embeddings = lm.model.get_input_embeddings().weight.clone()
    pruned, notes = method(sparsity, allocation=chosen)(lm, run_in)
    zeros, weights = zeros_of(pruned)
    assert zeros / weights == pytest.approx(sparsity, abs=0.001)
    noted = notes["block_sparsities"]
    assert sum(noted) / len(noted) == pytest.approx(sparsity, abs=0.001)  # the blocks are alike in size
    assert (max(noted) - min(noted) > 0.001) == (chosen != "uniform")
    if chosen == "uniform":
        for name, linear in linears(pruned.model).items():
            assert (linear.weight == 0).float().mean().item() == pytest.approx(sparsity, abs=0.001), name
    assert torch.equal(pruned.model.get_input_embeddings().weight, embeddings)
    calibrated = method is not Magnitude or chosen == "owl"
    assert ("calibration_sha256" in notes) == calibrated


def test_magnitude_global_is_one_threshold_over_all_matrices(run_in) -> None:
    lm = trained()
    everything = torch.cat([linear.weight.abs().flatten().float() for linear in linears(lm.model).values()])
    threshold = everything.kthvalue(round(0.6 * len(everything))).values
    before = {name: linear.weight.clone().float() for name, linear in linears(lm.model).items()}
    for name, linear in linears(Magnitude(0.6, allocation="global")(lm, run_in).lm.model).items():
        zero = linear.weight == 0
        assert zero[before[name].abs() < threshold].all(), name
        assert not zero[before[name].abs() > threshold].any(), name


def test_allocation_never_empties_a_matrix(tiny: Path, run_in) -> None:
    lm = pretrained(str(tiny))
    lm.model.model.layers[1].mlp.up_proj.weight.data *= 1e-3
    pruned = Magnitude(0.6, allocation="global")(lm, run_in).lm
    weight = pruned.model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).float().mean().item() == pytest.approx(allocation.MOST, abs=0.001)
    zeros, weights = zeros_of(pruned)
    assert zeros / weights == pytest.approx(0.6, abs=0.001)


def test_owl_is_the_authors_formula() -> None:
    """Shares of outliers scaled to [0, 2 lambda], sparsity = target + their mean - their own."""
    outliers, target, spread = [0.01, 0.05, 0.02, 0.09], 0.7, 0.08
    scaled = [(d - 0.01) / 0.08 * 2 * spread for d in outliers]
    expected = [target + sum(scaled) / 4 - d for d in scaled]
    assert allocation.owl(outliers, [10, 10, 10, 10], target, spread) == pytest.approx(expected)
    # blocks of different sizes: the mean over weights, and within what a layer may lose
    found = allocation.owl(outliers, [10, 30, 10, 50], 0.95, 0.3)
    assert sum(s * n for s, n in zip(found, [10, 30, 10, 50], strict=True)) / 100 == pytest.approx(0.95)
    assert max(found) == allocation.MOST
    assert allocation.owl([0.1, 0.1], [1, 1], 0.5, 0.08) == pytest.approx([0.5, 0.5])


def test_outliers_are_counted_over_the_whole_block() -> None:
    scores = [torch.tensor([[1.0, 1.0], [1.0, 20.0]]), torch.tensor([[1.0, 1.0, 1.0, 14.0]])]
    assert allocation.outlier_share(scores, 2.5) == 2 / 8  # the mean is 5
    assert allocation.outlier_share(scores, 3.5) == 1 / 8


@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 0.95])
def test_global_thresholds_meet_the_target_among_zeros_and_scales(target: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.rand(50, 40 + i, generator=generator) * 10.0**i for i in range(4)}
    scores["0"][:20] = 0
    found = allocation.global_threshold({n: allocation.histogram(s) for n, s in scores.items()}, target)
    sizes = {name: score.numel() for name, score in scores.items()}
    assert sum(found[n] * sizes[n] for n in found) / sum(sizes.values()) == pytest.approx(target)
    assert list(found.values()) == sorted(found.values(), reverse=True)  # the smaller the scores, the more goes
    everything = torch.cat([score.flatten() for score in scores.values()]).sort().values
    if 0.15 < target < 0.9:  # nothing is clipped, and the threshold is no tie
        threshold = everything[round(target * len(everything))]
        for name, score in scores.items():
            assert found[name] == pytest.approx(min((score < threshold).float().mean().item(), 0.99), abs=0.01)


def test_wanda_scores_by_the_norms_that_reach_each_layer(tiny: Path, run_in) -> None:
    """The first block's query projection against eq. 1 of the paper, computed from a plain forward with a hook."""
    from winnow.data.calibration import calibration_batches

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
    pruned = Wanda(0.5)(lm, run_in).lm.model.model.layers[0].self_attn.q_proj.weight
    assert (pruned != expected).float().mean() < 0.001  # sums in another order may flip a near tie


@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_as_large_as_predicted(method: Any, tmp_path: Path, run_in) -> None:
    made = pipeline.compress(trained(), {"pruned": method()}, run_in, tmp_path / "artifact")
    plan = method().predict(layout_of(trained()))
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_it_prunes_every_family_the_same_each_time(method: Any, family: str, tmp_path: Path, run_in) -> None:
    """Gemma-3 has two kinds of layers; Qwen2 has biases, which stay."""
    folder = random_model(family, tmp_path / family)
    runs = [method(0.55, allocation="owl")(pretrained(str(folder)), run_in).lm for _ in range(2)]
    first, second = (dict(lm.model.named_parameters()) for lm in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    zeros, weights = zeros_of(runs[0])
    assert zeros / weights == pytest.approx(0.55, abs=0.001)
    before, pruned = pretrained(str(folder)).model, {f"{name}.weight" for name in linears(runs[0].model)}
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, first[name]) == (name not in pruned), name
