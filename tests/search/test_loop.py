"""The loop: what is refused costs nothing, what dies is tried once more, what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agent import world
from winnow.agent.samplers import Grid
from winnow.core.errors import Reason, UserError
from winnow.core.types import Strategy
from winnow.search.forecaster import Forecasts
from winnow.search.job import RIVALS
from winnow.search.loop import Search
from winnow.search.views import Views
from winnow.study.budget import Budget, Convergence
from winnow.study.opening import open_study
from winnow.study.study import Proposal

Outcome = dict[str, Any]


def outcome(proposal: Proposal, **changes: Any) -> Outcome:
    found = world.figures(proposal.strategy)
    return {"figures": found, "sources": {}, "reason": None, "message": "", "seconds": {"evaluate": 1.0}} | changes


class Found:
    """A search over the narrow space, and what it launched."""

    def __init__(self, folder: Path, launch: Callable[[Proposal, int], Outcome] = lambda p, w: outcome(p), **more: Any):
        self.launched: list[str] = []

        def launching(proposal: Proposal, worker: int) -> Outcome:
            self.launched.append(str(proposal.strategy))
            return launch(proposal, worker)

        self.study = open_study("loop", f"sqlite:///{folder / 'study.db'}", world.OBJECTIVES, {"model": {"name": "m"}})
        asked = more.pop("asked", lambda strategies: [{} for _ in strategies])
        self.search = Search(
            study=self.study,
            space=more.pop("space", None) or world.narrow(),
            policy=more.pop("policy", None) or Grid(),
            forecaster=Forecasts(asked),
            launch=launching,
            budget=more.pop("budget", Budget(trials=30)),
            folder=folder,
            shared=[],
            views=Views(folder),
            **more,
        )


def test_the_space_is_searched_and_its_front_kept(tmp_path: Path) -> None:
    found = Found(tmp_path)
    found.search.run()
    assert len(found.launched) == 30 and len(set(found.launched)) == 30
    front = json.loads((tmp_path / "front.json").read_text())["points"]
    assert {point["trial"] for point in front} == set(found.study.front)
    told = json.loads((tmp_path / "trials" / "29" / RIVALS).read_text())
    assert {rival["number"] for rival in told["front"]} <= set(range(29)) and told["front"]
    assert told["base"]["number"] == 0 and set(told["base"]["figures"]) == {"accuracy", "size_bytes"}
    assert set(map(int, told["scored"])) >= {rival["number"] for rival in told["front"]}


def test_it_begins_with_the_base_model_and_the_smallest_of_what_it_is_given(tmp_path: Path) -> None:
    def asked(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"figures": {"size_bytes": 1 - s["knobs"].get("method.wanda.sparsity", 0)}} for s in strategies]

    given = [Strategy(("wanda",), {"method.wanda.sparsity": share}) for share in (0.3, 0.6)]
    found = Found(tmp_path, asked=asked, budget=Budget(trials=3), first=given, first_trials=1)
    found.search.run()
    assert found.launched[:2] == ["base", "wanda(sparsity=0.6)"]
    assert [t.proposed_by for t in found.study.trials] == ["base", "first", "grid"]


def test_what_is_refused_is_written_down_and_not_run(tmp_path: Path) -> None:
    def asked(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"refusal": "too large"} if "nf4" in s["methods"] else {} for s in strategies]

    found = Found(tmp_path, asked=asked, budget=Budget(trials=28))
    found.search.run()
    assert not any("nf4" in line for line in found.launched) and len(found.launched) == 27
    refused = [t for t in found.study.trials if t.reason is Reason.INFEASIBLE]
    assert {str(t.strategy) for t in refused} >= {"nf4"} and all(t.message == "too large" for t in refused)


def test_a_trial_that_died_is_tried_once_more(tmp_path: Path) -> None:
    deaths: list[int] = []

    def launch(proposal: Proposal, worker: int) -> Outcome:
        if "nf4" in proposal.strategy.methods or (len(deaths) == 0 and "rtn" in proposal.strategy.methods):
            deaths.append(proposal.number)
            return outcome(proposal, figures={}, reason=Reason.CRASHED.value, message="killed")
        return outcome(proposal)

    found = Found(tmp_path, launch, budget=Budget(trials=40))
    found.search.run()
    assert found.launched.count("nf4") == 2  # twice in vain
    once = [name for name in set(found.launched) if found.launched.count(name) == 2 and "nf4" not in name]
    assert len(once) == 1 and [t.complete for t in found.study.trials if str(t.strategy) == once[0]] == [False, True]
    assert len(set(found.launched)) == 30


def test_other_failures_are_not_tried_again(tmp_path: Path) -> None:
    def launch(proposal: Proposal, worker: int) -> Outcome:
        failed = {"figures": {}, "reason": Reason.UNSERVABLE.value, "message": "broken"}
        return outcome(proposal, **(failed if "nf4" in proposal.strategy.methods else {}))

    found = Found(tmp_path, launch)
    found.search.run()
    assert found.launched.count("nf4") == 1


def test_it_ends_when_nothing_is_gained(tmp_path: Path, log_lines: list[str]) -> None:
    found = Found(
        tmp_path, lambda p, w: outcome(p, figures={"accuracy": 0.5, "size_bytes": 1e6}), convergence=Convergence(4)
    )
    found.search.run()
    assert len(found.launched) == 5 and any("4 trials in a row have gained nothing" in line for line in log_lines)


def test_a_base_model_that_fails_ends_it(tmp_path: Path) -> None:
    failed = {"figures": {}, "reason": Reason.OUT_OF_MEMORY.value, "message": "too large"}
    with pytest.raises(UserError, match="the base model cannot be evaluated .*too large"):
        Found(tmp_path, lambda p, w: outcome(p, **failed)).search.run()


def test_a_disturbed_base_model_is_measured_again_before_anything_else(tmp_path: Path, log_lines: list[str]) -> None:
    sources = {"size_bytes": "measured, disturbed"}

    def launch(proposal: Proposal, worker: int) -> Outcome:
        return outcome(proposal, sources=sources if proposal.number == 0 else {})

    found = Found(tmp_path, launch, budget=Budget(trials=4), workers=3)
    found.search.run()
    assert found.launched[:2] == ["base", "base"] and found.launched.count("base") == 2
    assert found.study.run_trials == 4 and found.study.base is not None and found.study.base.number == 1
    assert 0 not in found.study.front
    said = "trial 0 is the base model, with which all others are compared, and its size_bytes was measured beside other work"
    assert f"{said}; it is tried once more" in log_lines
    again = Found(tmp_path, launch, budget=Budget(trials=4))
    again.search.run()
    assert again.launched == []


def test_a_figure_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    def launch(proposal: Proposal, worker: int) -> Outcome:
        bad = {"figures": {"accuracy": float("nan"), "size_bytes": 1.0}}
        return outcome(proposal, **(bad if proposal.strategy.methods == ("nf4",) else {}))

    found = Found(tmp_path, launch)
    found.search.run()
    (trial,) = [t for t in found.study.trials if t.strategy.methods == ("nf4",)]
    assert trial.reason is Reason.NOT_FINITE and "accuracy is not a finite number" in trial.message


def test_the_same_search_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Found(tmp_path, budget=Budget(trials=7))
    first.search.run()
    second = Found(tmp_path, budget=Budget(trials=12))
    second.search.run()
    assert len(first.launched) == 7 and len(second.launched) == 5
    assert not set(first.launched) & set(second.launched)
    assert [t.number for t in second.study.trials] == list(range(12))


def test_decisions_are_kept_with_their_reasons(tmp_path: Path) -> None:
    Found(tmp_path, budget=Budget(trials=4)).search.run()
    again = open_study("loop", f"sqlite:///{tmp_path / 'study.db'}", world.OBJECTIVES, {"model": {"name": "m"}})
    assert [t.proposed_by for t in again.trials] == ["base", "grid", "grid", "grid"]
    assert all(t.decision["why"] == "next on the grid" for t in again.trials[1:])
