"""Non-domination and hypervolume against plain references."""

from __future__ import annotations

import itertools
import random

import pytest

from winnow.core.errors import Reason
from winnow.core.types import Objective, Strategy, Trial
from winnow.study import pareto

OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False))


def trial(number: int, accuracy: float, size: float, reason: Reason | None = None) -> Trial:
    figures = {} if reason else {"accuracy": accuracy, "size_bytes": size}
    return Trial(number, Strategy(("rtn",)), figures=figures, reason=reason)


def dominates(a: Trial, b: Trial) -> bool:
    no_worse = a.figures["accuracy"] >= b.figures["accuracy"] and a.figures["size_bytes"] <= b.figures["size_bytes"]
    return no_worse and dict(a.figures) != dict(b.figures)


def test_the_front_is_what_nothing_dominates() -> None:
    rng = random.Random(3)
    trials = [trial(i, rng.randint(0, 20) / 20, rng.randint(1, 30)) for i in range(60)]
    expected = [t for t in trials if not any(dominates(o, t) for o in trials)]
    kept = pareto.front(trials, OBJECTIVES)
    assert {tuple(trials[n].figures.values()) for n in kept} == {tuple(t.figures.values()) for t in expected}
    assert len({tuple(trials[n].figures.values()) for n in kept}) == len(kept)  # equal points stand there once


def test_differences_below_the_resolution_are_none() -> None:
    size = Objective("size_bytes", False, "bytes", resolution=0.001)
    trials = [trial(0, 0.9, 2_853_712), trial(1, 0.8, 2_853_707), trial(2, 0.7, 2_800_000)]
    assert pareto.front(trials, OBJECTIVES) == (0, 1, 2)
    assert pareto.front(trials, (OBJECTIVES[0], size)) == (0, 2)
    speed = Objective("decode_tokens_per_s", True, resolution=0.02)
    fast = [
        Trial(i, Strategy(), {"accuracy": a, "decode_tokens_per_s": s})
        for i, (a, s) in enumerate([(0.9, 100), (0.8, 100.5), (0.7, 120)])
    ]
    assert pareto.front(fast, (OBJECTIVES[0], speed)) == (0, 2)


def test_the_front_does_not_rest_on_a_disturbed_figure() -> None:
    objectives = (*OBJECTIVES, Objective("latency_ms", False, "ms"), Objective("decode_tokens_per_s", True))

    def measured(number: int, accuracy: float, size: float, latency: float, source: str = "measured") -> Trial:
        figures = {"accuracy": accuracy, "size_bytes": size, "latency_ms": latency, "decode_tokens_per_s": 1 / latency}
        sources = {"latency_ms": source, "decode_tokens_per_s": source}
        return Trial(number, Strategy(), figures=figures, sources=sources)

    calm = [measured(0, 0.9, 10, 100), measured(1, 0.8, 5, 90)]
    fast = measured(2, 0.9, 5, 1, "measured, disturbed")  # would put both others off the front
    assert pareto.front([*calm, fast], objectives) == (0, 1, 2)  # there for its size and accuracy
    for_its_speed = measured(3, 0.7, 20, 1, "measured, disturbed")
    assert pareto.front([*calm, for_its_speed], objectives) == (0, 1)
    # where everything was disturbed, the other objectives are what is left
    noisy = [
        measured(n, a, s, 100 - n, "measured, disturbed") for n, (a, s) in enumerate([(0.9, 10), (0.8, 5), (0.7, 7)])
    ]
    assert pareto.front(noisy, objectives) == (0, 1)
    series = pareto.hypervolume_series([*calm, fast], objectives)
    assert series[0] < series[1] == series[2]


def test_failed_trials_are_never_on_the_front_and_add_no_volume() -> None:
    trials = [trial(0, 0.9, 10), trial(1, 0, 0, Reason.CRASHED), trial(2, 0.8, 5)]
    assert pareto.front(trials, OBJECTIVES) == (0, 2)
    series = pareto.hypervolume_series(trials, OBJECTIVES)
    assert series[0] == series[1] < series[2]


def test_the_hypervolume_is_the_area_that_is_dominated() -> None:
    trials = [trial(0, 0.0, 0), trial(1, 1.0, 10), trial(2, 0.75, 2)]
    # scaled, less is better: (1, 0), (0, 1), (0.25, 0.2), with the reference at (1.1, 1.1)
    points, reference = [(1.0, 0.0), (0.0, 1.0), (0.25, 0.2)], 1.1
    grid = [i / 1000 * reference for i in range(1001)]
    cell = (reference / 1000) ** 2
    area = sum(cell for x, y in itertools.product(grid[:-1], grid[:-1]) if any(a <= x and b <= y for a, b in points))
    assert pareto.hypervolume_series(trials, OBJECTIVES)[-1] == pytest.approx(area / reference**2, abs=0.005)


def test_nothing_complete_means_no_front() -> None:
    assert pareto.front([], OBJECTIVES) == ()
    assert pareto.hypervolume_series([trial(0, 0, 0, Reason.TIMEOUT)], OBJECTIVES) == (0.0,)
