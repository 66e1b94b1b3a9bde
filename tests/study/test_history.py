"""What a search knows of itself: its front, what gained something, what it spent; and what constraints keep off the front."""

from __future__ import annotations

import random

import pytest

from winnow.core.errors import Reason, UserError
from winnow.core.types import Strategy, Trial
from winnow.study import pareto
from winnow.study.budget import Budget, Convergence
from winnow.study.history import History
from winnow.study.objectives import KNOWN, broken_constraints, constraints

OBJECTIVES = (KNOWN["accuracy"], KNOWN["size_bytes"])


def trial(number: int, accuracy: float, size: float, reason: Reason | None = None, **more: object) -> Trial:
    figures = {} if reason else {"accuracy": accuracy, "size_bytes": size}
    strategy = Strategy(("rtn",), {"method.rtn.bits": number}) if number else Strategy()
    return Trial(number, strategy, figures=figures, reason=reason, **more)  # type: ignore[arg-type]


def test_the_front_grows_as_if_made_from_all_trials_at_once() -> None:
    rng, history = random.Random(0), History(OBJECTIVES)
    for number in range(80):
        history.end(trial(number, rng.randint(0, 30) / 30, rng.randint(1, 40) * 1e6))
        assert history.front == pareto.front(history.trials, OBJECTIVES)
    series = pareto.hypervolume_series(history.trials, OBJECTIVES)
    gained = [n for n in range(1, 80) if series[n] > series[n - 1] + 1e-9]
    assert set(gained) <= {n for n, gain in history.gains.items() if gain > 0}


def test_a_disturbed_base_model_is_run_again_and_the_second_time_stands() -> None:
    sources = {"size_bytes": "measured, disturbed"}
    history = History(OBJECTIVES)
    history.end(trial(0, 0.95, 4e6, sources={"latency_ms": "measured, disturbed"}))
    assert history.base is history.trials[0]  # what was disturbed is no objective
    history = History(OBJECTIVES)
    history.end(trial(0, 0.95, 4e6, sources=sources))
    assert history.base is None and history.runs_again(history.trials[0])
    assert history.front == () and history.run_trials == 0
    history.end(trial(0, 0.95, 5e6, sources=sources, decision={"retried": 0}))
    assert history.base is history.trials[1] and not history.runs_again(history.trials[1])
    assert history.front == (0,) and history.run_trials == 1
    history.end(trial(3, 0.96, 6e6, sources=sources))
    assert not history.runs_again(history.trials[2])  # others only count less
    assert history.gains[3] == 0


def test_what_breaks_a_constraint_is_complete_and_never_on_the_front() -> None:
    limits = constraints({"accuracy_drop": 0.02, "size_bytes": 5e6}, ())
    history = History(OBJECTIVES, limits)
    for number, (accuracy, size) in enumerate([(0.95, 4e6), (0.94, 2e6), (0.90, 1e6), (0.96, 9e6)]):
        history.end(trial(number, accuracy, size))
    assert history.front == (0, 1)
    assert history.broken_constraints(history.trials[2]) == [
        "its accuracy is 0.050 below the base model's, over accuracy_drop=0.02"
    ]
    assert history.broken_constraints(history.trials[3]) == ["size_bytes is 9e+06, over 5e+06"]


def test_limits_go_the_way_of_their_figure() -> None:
    limits = constraints({"decode_tokens_per_s": 10, "memory_bytes": 8e9, "gsm8k": 0.5}, ("gsm8k",))
    assert set(limits) == {"decode_tokens_per_s", "peak_memory_bytes", "gsm8k"}
    good = {"decode_tokens_per_s": 11.0, "peak_memory_bytes": 7e9, "gsm8k": 0.6}
    bad = {"decode_tokens_per_s": 9.0, "peak_memory_bytes": 9e9, "gsm8k": 0.4}
    assert broken_constraints(good, limits, None) == [] and len(broken_constraints(bad, limits, None)) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latncy_ms": 5}, "did you mean latency_ms"),
        ({"size_bytes": "small"}, "is no number"),
        ({"size_bytes": True}, "no number"),
    ],
)
def test_constraints_that_mean_nothing_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        constraints(given, ())


def test_budgets_end_a_search_and_say_which() -> None:
    history = History(OBJECTIVES)
    for number in range(4):
        history.end(trial(number, 0.9, 1e6 - number, energy={"wh": 2.0, "co2_g": 1.0}))
    history.end(trial(4, 0, 0, Reason.INFEASIBLE))  # refused beforehand: costs nothing
    assert Budget(trials=5).spent(history) == ""
    history.begin(5, Strategy(("nf4",)))
    assert Budget(trials=5).spent(history) == "budget.trials=5 is spent"  # what runs counts, too
    assert Budget(trials=None, kwh=0.008).spent(history) == "budget.kwh=0.008 is spent"
    assert Budget(trials=None, kwh=0.009).spent(history) == ""
    assert Budget(trials=None, co2_kg=0.004).spent(history) == "budget.co2_kg=0.004 is spent"
    clock = Budget(trials=None, hours=1e-12)
    clock.start()
    assert clock.spent(history) == "budget.hours=1e-12 is spent"


@pytest.mark.parametrize("settings", [{"trials": None}, {"trials": 0}, {"kwh": -1.0}, {"trials": None, "usd": 3.0}])
def test_budgets_without_an_end_or_of_nothing_are_refused(settings: dict[str, float | None]) -> None:
    with pytest.raises(UserError, match="budget"):
        Budget(**settings)  # type: ignore[arg-type]


def test_a_search_that_gains_nothing_has_converged() -> None:
    history = History(OBJECTIVES)
    for number, accuracy in enumerate([0.9, 0.95, 0.8, 0.7, 0.6]):
        history.end(trial(number, accuracy, 1e6 * (number + 1)))
    assert "3 trials in a row" in Convergence(3).reached(history)
    assert Convergence(4).reached(history) == "" and Convergence(None).reached(history) == ""
    history.end(trial(9, 0.99, 1e7))
    assert Convergence(3).reached(history) == ""
