"""Bits per layer: scores against trying it out, the allocation against all there are, artifacts against uniform ones."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.method.scores import perplexity
from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import UserError
from winnow.data.calibration import calibration_batches
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline, sensitivity
from winnow.method.mixed import WIDTHS, Mixed, allocate
from winnow.method.prune import Magnitude
from winnow.method.rtn import RTN, rtn_scale
from winnow.model import packing
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

IDS = torch.arange(40)[None] + 100


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    return lm.model(input_ids=IDS).logits.float()


def sizes_of(lm: LM) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, linear in linears(lm.model).items():
        unit = sensitivity.unit_of(name)
        sizes[unit] = sizes.get(unit, 0) + linear.weight.numel()
    return sizes


@pytest.mark.parametrize("bits", WIDTHS)
def test_trial_rounding_is_the_rounding_that_is_saved(bits: int) -> None:
    lm = pretrained(str(WEIGHTS))
    name, linear = next(iter(linears(lm.model).items()))
    expected = sensitivity.round_weights(linear.weight.data, bits, 64)
    packing.attach_scheme(lm.model, bits, 64)
    packing.quantize_linear(linear, rtn_scale(linear.weight.data, bits, 64))
    assert torch.equal(linear.weight.data, expected), name


@torch.no_grad()
def test_a_recipes_divergence_is_that_of_the_whole_model(run_in: Run) -> None:
    lm = pretrained(str(WEIGHTS))
    batches, _ = calibration_batches(lm, run_in)
    recipe = {name: WIDTHS[number % 3] for number, name in enumerate(linears(lm.model))}
    kept = {name: linear.weight.detach().clone() for name, linear in linears(lm.model).items()}
    (found,) = sensitivity.divergences(lm.model, batches, [recipe], 64, run_in)
    assert all(torch.equal(linear.weight, kept[name]) for name, linear in linears(lm.model).items())
    before = [lm.model(input_ids=ids).logits.float().log_softmax(-1) for ids in batches]
    for name, linear in linears(lm.model).items():
        linear.weight.data = sensitivity.round_weights(linear.weight.data, recipe[name], 64)
    after = [lm.model(input_ids=ids).logits.float().log_softmax(-1) for ids in batches]
    total = sum((b.exp() * (b - a)).sum().item() for b, a in zip(before, after, strict=True))
    assert found == pytest.approx(total / sum(ids.numel() for ids in batches), rel=0.02)  # rows alone and in batches


def test_scores_order_layers_as_trying_each_does(run_in: Run) -> None:
    """The estimate of one backward pass against its plain reference: a forward pass with one unit rounded."""
    lm = pretrained(str(WEIGHTS))
    batches, _ = calibration_batches(lm, run_in)
    kept = {name: (p.requires_grad, p.detach().clone()) for name, p in lm.model.named_parameters()}
    scores = sensitivity.sensitivities(lm.model, batches, WIDTHS, 64, run_in)
    for name, parameter in lm.model.named_parameters():
        assert parameter.requires_grad == kept[name][0] and torch.equal(parameter, kept[name][1]), name
    assert list(scores) == list(sizes_of(lm))
    assert all(by_width[2] > by_width[3] > by_width[4] > by_width[8] > 0 for by_width in scores.values())

    def alone(unit: str, bits: int) -> dict[str, int]:
        return {name: bits if sensitivity.unit_of(name) == unit else 8 for name in linears(lm.model)}

    tried = [(unit, bits) for unit in scores for bits in (2, 3)]
    exact = sensitivity.divergences(lm.model, batches, [alone(*which) for which in tried], 64, run_in)
    pair = torch.tensor([exact, [scores[unit][bits] for unit, bits in tried]]).log()
    assert torch.corrcoef(pair)[0, 1] > 0.95


@pytest.mark.parametrize("seed", range(20))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"u{number}": rng.choice((256, 512, 768, 2048)) for number in range(5)}
    scores = {
        unit: dict(zip(WIDTHS, sorted((rng.random() for _ in WIDTHS), reverse=True), strict=True)) for unit in sizes
    }
    bits = rng.uniform(2, 8)

    def cost(widths: tuple[int, ...]) -> float:
        return sum(scores[unit][width] for unit, width in zip(sizes, widths, strict=True))

    def size(widths: tuple[int, ...]) -> int:
        return sum(sizes[unit] * width for unit, width in zip(sizes, widths, strict=True))

    fitting = [w for w in itertools.product(WIDTHS, repeat=5) if size(w) <= bits * sum(sizes.values())]
    found = allocate(scores, sizes, bits)
    assert list(found) == list(sizes)
    assert tuple(found.values()) in fitting
    assert cost(tuple(found.values())) == pytest.approx(cost(min(fitting, key=cost)))


def test_a_budget_of_too_many_steps_is_not_exceeded() -> None:
    sizes = {"a": 7_000_003, "b": 11_000_027, "c": 5_000_011}  # no common divisor
    scores = {unit: {2: 9.0, 3: 5.0, 4: 1.0, 8: 0.0} for unit in sizes}
    for bits in (2.0, 2.7, 3.3, 5.0, 8.0):
        found = allocate(scores, sizes, bits)
        assert sum(sizes[unit] * found[unit] for unit in sizes) <= bits * sum(sizes.values())
    assert set(allocate(scores, sizes, 2.0).values()) == {2}


def test_it_beats_uniform_bits_at_the_same_size(tmp_path: Path, run_in: Run) -> None:
    made = {}
    for name, stage in {"rtn": RTN(3, 64), "mixed": Mixed(3.0, 64)}.items():
        made[name] = pipeline.compress(pretrained(str(WEIGHTS)), {name: stage}, run_in, tmp_path / name)
    sizes = {name: lm.manifest["sizes"]["weight_bytes"] for name, lm in made.items()}
    assert sizes["mixed"] <= sizes["rtn"]
    assert perplexity(pretrained(str(tmp_path / "mixed"))) < perplexity(pretrained(str(tmp_path / "rtn")))
    record = made["mixed"].manifest["stages"][-1]
    assert record["average_bits"] <= 3 and set(record["widths"]) == set(sizes_of(pretrained(str(WEIGHTS))))
    assert record["divergence"]["mixed"] < record["divergence"]["uniform_3"]
    assert len(record["calibration_sha256"]) == 64
    with pytest.MonkeyPatch.context() as patch:  # another target needs no further scoring
        patch.setattr(sensitivity, "sensitivities", lambda *args: pytest.fail("scored again"))
        other = pipeline.compress(pretrained(str(WEIGHTS)), {"mixed": Mixed(2.5, 64)}, run_in, tmp_path / "other")
    assert 2.4 < other.manifest["stages"][-1]["average_bits"] <= 2.5
    for bits, lm in ((3.0, made["mixed"]), (2.5, other)):
        predicted = Mixed(bits, 64).predict(layout_of(pretrained(str(WEIGHTS)))).disk_bytes
        assert predicted == pytest.approx(lm.manifest["sizes"]["size_bytes"], rel=0.005)


def test_kept_scores_are_of_these_weights_and_settings(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    def kept() -> list[Path]:
        return sorted(tmp_path.glob("statistics/sensitivity-*"))

    def make(stage: Mixed, lm: LM | None = None, run: Run = run_in) -> None:
        stage(lm or pretrained(str(tiny)), run)

    make(Mixed(3.5, 32))
    (first,) = kept()
    scores = first.read_bytes()
    first.write_bytes(scores[:50])  # damaged: made anew
    make(Mixed(3.5, 32))
    assert first.read_bytes() == scores
    make(Mixed(3.5, 64))
    assert len(kept()) == 2
    changed = pretrained(str(tiny))
    changed.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    make(Mixed(3.5, 32), changed)
    assert len(kept()) == 3
    make(Mixed(3.5, 32), run=Run(run_in.folder, seed=1, calibration=run_in.calibration))
    assert len(kept()) == 4
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_recipe_worse_than_uniform_bits_is_refused(tmp_path: Path, run_in: Run) -> None:
    Mixed(3.0, 64)(pretrained(str(WEIGHTS)), run_in)
    (path,) = tmp_path.glob("statistics/sensitivity-*")
    # still fewer bits cost more, but the wrong layers get them
    save_file({unit: (1 / by_width).sort(descending=True).values for unit, by_width in load_file(path).items()}, path)
    with pytest.raises(
        UserError, match=r"method\.mixed\.bits=3: .* worse than 3 bits.*method=\[rtn\] method\.rtn\.bits=3"
    ):
        pipeline.compress(pretrained(str(WEIGHTS)), {"mixed": Mixed(3.0, 64)}, run_in, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_several_widths_load_again_bit_for_bit(family: str, tmp_path: Path, run_in: Run) -> None:
    from transformers import AutoModelForCausalLM

    base = random_model(family, tmp_path / "base")
    # set by hand: all widths, whatever the scores of random weights are
    lm = pretrained(str(base))
    units = list(sizes_of(lm))
    widths = {name: WIDTHS[units.index(sensitivity.unit_of(name)) % 4] for name in linears(lm.model)}
    packing.attach_scheme(lm.model, widths, 32)
    for name, linear in linears(lm.model).items():
        packing.quantize_linear(linear, rtn_scale(linear.weight.data, widths[name], 32))
    before = logits(lm)
    pipeline.compress(
        pretrained(str(base)), {"mixed": Mixed(3.5, 32)}, run_in, tmp_path / "made"
    )  # the whole way works
    save(lm, tmp_path / "artifact")
    written = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized"
    assert sorted(group["weights"]["num_bits"] for group in written["config_groups"].values()) == list(WIDTHS)
    for again in (
        pretrained(str(tmp_path / "artifact")).model,
        AutoModelForCausalLM.from_pretrained(tmp_path / "artifact"),
    ):
        again.eval()
        with torch.inference_mode():
            assert torch.equal(again(input_ids=IDS).logits.float(), before)
    made = pretrained(str(tmp_path / "made"))
    by_layer = {
        target: group["weights"]["num_bits"]
        for group in json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"][
            "config_groups"
        ].values()
        for target in group["targets"]
    }
    assert set(by_layer) == set(widths)
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for layer in (0, 1):
            assert len({b for n, b in by_layer.items() if f".{layer}." in n and n.endswith(fused)}) == 1
    predicted = Mixed(3.5, 32).predict(layout_of(pretrained(str(base)))).disk_bytes
    assert predicted == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.03)


def test_pruned_weights_stay_zero_and_the_same_seed_makes_the_same_bytes(
    tmp_path: Path, tiny: Path, run_in: Run
) -> None:
    stages = {"magnitude": Magnitude(sparsity=0.5), "mixed": Mixed(3.5, 32)}
    made = [pipeline.compress(pretrained(str(tiny)), stages, run_in, tmp_path / str(i)) for i in range(2)]
    assert made[0].manifest["sha256"] == made[1].manifest["sha256"]
    pruned = linears(Magnitude(sparsity=0.5)(pretrained(str(tiny)), run_in).lm.model)
    quantized = pretrained(str(tmp_path / "0"))
    logits(quantized)  # a forward pass unpacks the weights
    for name, linear in linears(quantized.model).items():
        assert (linear.weight[pruned[name].weight == 0] == 0).all(), name


def test_what_cannot_be_done_is_said_before_anything_heavy(tiny: Path, run_in: Run) -> None:
    with pytest.raises(UserError, match=r"group_size=128 does not divide the width 64"):
        pipeline.check({"mixed": Mixed(3.0, 128)}, pretrained(str(tiny)), run_in)
    with pytest.raises(UserError, match=r"method\.mixed\.bits=9 is out of range"):
        Mixed(9)
    one = Run(run_in.folder, calibration=type(run_in.calibration)(samples=1))
    with pytest.raises(UserError, match=r"calibration\.samples"):
        pipeline.check({"mixed": Mixed(3.0, 32)}, pretrained(str(tiny)), one)
    shared = pretrained(str(tiny))
    shared.model.config.num_kv_shared_layers = 1
    with pytest.raises(UserError, match=r"share keys and values"):
        pipeline.check({"mixed": Mixed(3.0, 32)}, shared, run_in)
