"""Trials are stopped where they cannot reach the front, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.test_conf import composed
from winnow.benchmark.order import Order
from winnow.benchmark.samples import FILE, Sample, read, write
from winnow.build.job_settings import trial_evaluation
from winnow.core.errors import Reason, Stopped, UserError
from winnow.core.types import Calibration, Figures, Strategy, Trial
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.runtime import serving
from winnow.search.early_stopping import LEAST_CHANCE, EarlyStopping, score_matrix, weights_of
from winnow.search.job import RIVALS
from winnow.study.objectives import KNOWN
from winnow.study.pareto import is_at_least_as_good

BENCHMARKS = ("nano_gsm8k", "nano_commonsenseqa", "nano_truthfulqa", "nano_humaneval")
SIZE, SPEED = 1e6, 100.0


def outcomes(accuracy: float, seed: int, items: int = 200) -> list[Sample]:
    """Of four benchmarks, and of BBH with subtasks of unequal sizes; texts besides."""
    rng = np.random.default_rng(seed)
    names = [(name, name) for name in BENCHMARKS for _ in range(items)]
    names += [("nano_bbh", "sorting")] * (items // 4) + [("nano_bbh", "counting")] * items
    found = []
    for number, (name, subtask) in enumerate(names):
        right = bool(rng.random() < accuracy)
        extra = {"mc2": float(right)} if name == "nano_truthfulqa" else {}
        found.append(Sample(name, subtask, f"item {number}", "p", "", "", right, float(right), extra=extra))
    return [*found, Sample("nano_text", "text", "text", "p", "", "", None, -12.0)]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder of trials: 3 and 5 are on the front, and 9 has begun."""
    rivals = []
    for number, accuracy, size, kl in ((3, 0.9, SIZE, 0.01), (5, 0.6, SIZE / 2, 0.4)):
        (tmp_path / str(number)).mkdir()
        samples = outcomes(accuracy, number)
        write(samples, tmp_path / str(number) / FILE)
        figures = {"accuracy": accuracy, "size_bytes": size, "latency_ms": SPEED, "kl_to_base": kl}
        rivals.append({"number": number, "figures": figures, "sources": {}})
    (tmp_path / "9").mkdir()
    scored = {rival["number"]: rival["figures"]["kl_to_base"] for rival in rivals}  # type: ignore[index]
    (tmp_path / "9" / RIVALS).write_text(json.dumps({"front": rivals, "scored": scored}))
    return tmp_path


def gates(study: Path, *overrides: str) -> EarlyStopping:
    composed_values = OmegaConf.to_container(composed("search", *overrides), resolve=True)
    trial = trial_evaluation(composed_values, "embedded", str(study / "9" / "metrics"))  # type: ignore[arg-type]
    return EarlyStopping(trial, study / "9")


def figures(size: float = SIZE, latency: float = SPEED, kl: float = 0.03) -> Figures:
    return Figures({"size_bytes": size, "latency_ms": latency, "kl_to_base": kl})


def raced(gate: EarlyStopping, samples: Sequence[Sample]) -> Stopped | None:
    drawn = gate.ordered(gates_benchmark()).item_order()  # type: ignore[attr-defined]
    scored = sorted((s for s in samples if s.correct is not None), key=lambda s: drawn.time((s.benchmark, s.doc_hash)))
    for count in (50, 150, 400, 800):
        try:
            gate.on_round(scored[:count], len(scored) - count)
        except Stopped as stopped:
            return stopped
    return None


def test_a_worse_one_loses_its_race_with_an_estimate_and_an_interval(study: Path) -> None:
    gate = gates(study)
    gate.on_measured(figures())
    samples = outcomes(0.5, seed=9)
    stopped = raced(gate, samples)
    assert stopped is not None and stopped.reason is Reason.DOMINATED and "trial 3" in stopped.message
    found = stopped.estimates
    assert 0 < found["share_scored"] < 0.5
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["accuracy_low"] <= 0.5 <= found["accuracy_high"]


def test_a_better_one_and_one_without_rivals_go_on(study: Path) -> None:
    better, alone, smaller = gates(study), gates(study), gates(study)
    better.on_measured(figures())
    alone.on_measured(figures(latency=SPEED / 2, kl=5.0))  # nothing on the front is as quick
    smaller.on_measured(figures(size=SIZE / 2, kl=0.5))  # only the weaker one is as small
    assert raced(better, outcomes(0.95, seed=9)) is None
    assert raced(alone, outcomes(0.1, seed=9)) is None
    assert raced(smaller, outcomes(0.75, seed=9)) is None


def test_what_is_far_off_the_base_model_is_hopeless_beside_one_that_is_near(study: Path) -> None:
    with pytest.raises(
        Stopped, match="that of trial 3, which is no worse in size_bytes, latency_ms, is 0.01"
    ) as stopped:
        gates(study).on_measured(figures(kl=0.05))
    assert stopped.value.reason is Reason.HOPELESS and stopped.value.estimates == {"share_scored": 0.0}
    gates(study).on_measured(figures(kl=0.03))  # within the ratio
    gates(study).on_measured(figures(size=SIZE / 2, kl=0.5))  # nothing that small is nearer
    gates(study, "racing.hopeless_ratio=0").on_measured(figures(kl=5.0))


def test_items_that_trials_like_it_got_wrong_come_early_and_in_another_order_each_time(study: Path) -> None:
    gate = gates(study)
    gate.on_measured(figures())
    drawn = gate.ordered(gates_benchmark()).item_order()  # type: ignore[attr-defined]
    wrong = {n: [(s.benchmark, s.doc_hash) for s in read(study / str(n) / FILE) if s.correct is False] for n in (3, 5)}
    both = set(wrong[3]) & set(wrong[5])
    assert {drawn.chance(item) for item in both} == {1 + LEAST_CHANCE}
    items = [(s.benchmark, s.doc_hash) for s in read(study / "3" / FILE) if s.correct is not None]
    early = sorted(items, key=drawn.time)[: len(items) // 4]
    assert np.mean([item in both for item in early]) > 2 * np.mean([item in both for item in items])
    assert sorted(items, key=drawn.time) != sorted(items, key=Order(drawn.seed + 1, drawn.chances).time)


def test_an_error_rate_of_0_scores_everything(study: Path) -> None:
    gate = gates(study, "racing.error_rate=0")
    gate.on_measured(figures())
    assert raced(gate, outcomes(0.1, seed=9)) is None


def test_perplexity_is_known_only_at_the_end_so_nothing_is_stopped(study: Path) -> None:
    gate = gates(study, "objectives=[accuracy,size_bytes,perplexity]")
    gate.on_measured(figures(kl=5.0))
    assert raced(gate, outcomes(0.1, seed=9)) is None


def test_a_trial_is_measured_in_turn_with_the_base_model_and_the_base_model_alone(study: Path, tiny: Path) -> None:
    gate = gates(study, "model=local", f"model.path={tiny}", "limits.memory_bytes=5000")
    assert gate.base() is None
    told = json.loads((study / "9" / RIVALS).read_text())
    base = {"number": 0, "figures": {"latency_ms": 150.0, "peak_memory_bytes": 3000.0}}
    (study / "9" / RIVALS).write_text(json.dumps({**told, "base": base}))
    for stages, expected in (([{"method": "rtn"}], (150.0, 3000.0, 5000)), ([], None)):
        gate = gates(study, "model=local", f"model.path={tiny}", "limits.memory_bytes=5000")
        lm = pretrained(str(tiny))
        lm.manifest = {"base": {"sha256": "0"}, "stages": stages}
        with serving(lm) as served:
            gate.on_loaded(lm, served, Run(study, calibration=Calibration(max_length=64)))
        found = gate.base()
        assert (found and (found.latency_ms, found.peak_memory_bytes, found.memory_limit_bytes)) == expected


def test_the_hardware_comes_last_where_no_objective_needs_it(study: Path) -> None:
    assert gates(study, "objectives=[accuracy,size_bytes]").scores_first
    assert not gates(study).scores_first


def test_weights_are_those_of_the_mean() -> None:
    samples = [s for s in outcomes(0.7, seed=1) if s.correct is not None]
    benchmark = gates_benchmark()
    scores = (KNOWN["accuracy"],)
    weights = weights_of(samples, benchmark.specs, scores)
    assert weights.sum() == pytest.approx(1.0)
    from winnow.benchmark.figures import figures as figures_of

    grouped = [(spec, [s for s in samples if s.benchmark == spec.name]) for spec in benchmark.specs if spec.metric]
    assert float((weights * score_matrix(samples, scores)).sum()) == pytest.approx(figures_of(grouped)["accuracy"])


def gates_benchmark():  # type: ignore[no-untyped-def]
    from winnow import build

    return build.benchmark(composed("search"))


def test_equal_within_the_resolution_is_equal() -> None:
    others = (KNOWN["size_bytes"], KNOWN["latency_ms"])
    base = of(1e6, 100.0)
    assert is_at_least_as_good(of(1.00001e6, 100.0), base, others)
    assert not is_at_least_as_good(of(1.1e6, 100.0), base, others)
    assert is_at_least_as_good(Trial(1, Strategy()), Trial(2, Strategy()), ())


def test_a_disturbed_figure_makes_no_rival() -> None:
    others = (KNOWN["size_bytes"], KNOWN["latency_ms"])
    calm, disturbed = of(1e6, 100.0), of(1e6, 10.0, "measured, disturbed")
    assert not is_at_least_as_good(disturbed, calm, others)
    assert is_at_least_as_good(calm, disturbed, others)  # it would not come onto the front beside the other
    assert is_at_least_as_good(disturbed, calm, others[:1])


def of(size: float, latency: float, source: str = "measured") -> Trial:
    return Trial(1, Strategy(), figures={"size_bytes": size, "latency_ms": latency}, sources={"latency_ms": source})


@pytest.mark.parametrize("setting", ["racing.error_rate=1.5", "racing.hopeless_ratio=-1", "racing.hopeless_floor=-0.1"])
def test_settings_that_mean_nothing_are_refused(study: Path, setting: str) -> None:
    with pytest.raises(UserError, match="racing"):
        gates(study, setting)
