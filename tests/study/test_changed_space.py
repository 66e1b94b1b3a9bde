"""A study goes on when its space has grown or shrunk: old trials keep their place, and no agent stumbles over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.agent import world
from tests.search.test_loop import Found, outcome
from winnow.agent.bandit import Bandit
from winnow.agent.gp import GP
from winnow.agent.portfolio import Portfolio
from winnow.agent.samplers import NSGA2, TPE, Grid, Random
from winnow.core.errors import Reason
from winnow.core.types import Strategy
from winnow.search import overrides
from winnow.study.budget import Budget, Convergence
from winnow.study.opening import open_study
from winnow.study.policy import Policy, Suggestion
from winnow.study.space import Space, read_space

POLICIES: dict[str, Callable[[], Policy]] = {
    "random": Random,
    "grid": Grid,
    "tpe": lambda: TPE(startup_trials=2),
    "nsga2": lambda: NSGA2(population_size=4),
    "gp": GP,
    "bandit": Bandit,
    "portfolio": lambda: Portfolio({"tpe": TPE(startup_trials=2), "gp": GP()}, {"tpe": 0.5, "gp": 0.5}),
}


def space_of(names: str, *arguments: str) -> Space:
    methods = {name: world.METHODS[name] for name in names.split()}
    return read_space(methods, overrides.parse(arguments).narrowed)


FEW = "method.rtn.bits=choice(3,4)"
STARTS: dict[str, tuple[Space, Space]] = {
    "another method": (space_of("rtn", FEW), space_of("rtn nf4")),
    "a method less": (space_of("rtn nf4 wanda"), space_of("rtn", FEW)),
    "another slot": (space_of("rtn", FEW), space_of("wanda lora rtn", FEW)),
    "other methods": (space_of("wanda", "method.wanda.pattern=unstructured"), space_of("rtn")),
    "more choices": (space_of("rtn", FEW), space_of("rtn", "method.rtn.bits=choice(2,3,4)")),
    "fewer choices": (space_of("rtn"), space_of("rtn", "method.rtn.bits=choice(3,8)")),
    "choices of a range": (
        space_of("wanda", "method.wanda.pattern=unstructured"),
        space_of("wanda", "method.wanda.pattern=unstructured", "method.wanda.sparsity=choice(0.2,0.25,0.3,0.65,0.9)"),
    ),
    "a range of choices": (
        space_of("wanda", "method.wanda.pattern=unstructured", "method.wanda.sparsity=choice(0.2,0.65,0.9)"),
        space_of("wanda", "method.wanda.pattern=unstructured", "method.wanda.sparsity=interval(0.3,0.6)"),
    ),
    "a knob more": (space_of("lora"), space_of("lora", "method.lora.steps=interval(20,200)")),
    "other settings": (space_of("lora", "method.lora.steps=50"), space_of("lora", "method.lora.targets=[q_proj]")),
}


CASES = [("tpe", change) for change in STARTS]
CASES += [(policy, change) for change in ("another slot", "a method less") for policy in POLICIES]


@pytest.mark.parametrize(("policy", "change"), list(dict.fromkeys(CASES)))
def test_a_study_goes_on_in_another_space(policy: str, change: str, tmp_path: Path, log_lines: list[str]) -> None:
    before, after = STARTS[change]
    first = Found(tmp_path, budget=Budget(trials=4), space=before, policy=POLICIES[policy]())
    first.search.run()
    front = {trial.number: trial for trial in first.study.on_front}
    first.study.close()
    then = Found(tmp_path, budget=Budget(trials=6), space=after, policy=POLICIES[policy]())
    then.search.run()
    new = then.study.trials[4:]
    assert len(new) == 2 == len(then.launched) and all(after.contains(trial.strategy) for trial in new), log_lines
    assert len({trial.strategy.overrides for trial in then.study.trials}) == 6
    better = [t.figures for t in then.study.on_front]
    for number, trial in front.items():  # on the front still, or behind a new one
        assert number in then.study.front or any(all(_no_worse(f, trial.figures)) for f in better)
    assert any("the space is another one now" in line for line in log_lines), log_lines
    then.study.close()
    stored = optuna.load_study(study_name="loop", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    for trial, frozen in zip(then.study.trials, stored, strict=True):  # what other programs see
        seen = {name.partition("#")[0]: value for name, value in frozen.params.items()}
        assert {k: v for k, v in trial.strategy.knobs.items() if k in seen} == {
            k: v for k, v in seen.items() if not k.startswith("slot.")
        }
        chosen = {value for name, value in seen.items() if name.startswith("slot.")} - {"none"}
        assert chosen == set(trial.strategy.methods)


def _no_worse(one: Any, other: Any) -> list[bool]:
    return [one["accuracy"] >= other["accuracy"], one["size_bytes"] <= other["size_bytes"]]


def test_the_same_space_is_no_other_one_however_it_is_typed(tmp_path: Path, log_lines: list[str]) -> None:
    for trials, typed in (
        (3, "method.rtn.bits=choice(3,4)"),
        (4, "method.rtn.bits=4,3"),
        (5, "method.rtn.bits=range(3,5)"),
    ):
        found = Found(tmp_path, budget=Budget(trials=trials), space=space_of("rtn", typed))
        found.search.run()
        assert not any("another one" in line for line in log_lines)
    stored = optuna.load_study(study_name="loop", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert {name for trial in stored.trials for name in trial.params} == {
        "slot.quantize", "method.rtn.bits", "method.rtn.group_size"
    }  # fmt: skip


def test_a_search_that_had_converged_goes_on_in_a_larger_space(tmp_path: Path) -> None:
    def poor(proposal: Any, worker: int) -> dict[str, Any]:
        figures = (
            {"accuracy": 0.9, "size_bytes": 1e6}
            if not proposal.strategy.methods
            else {"accuracy": 0.5, "size_bytes": 2e6}
        )
        return outcome(proposal, figures=figures)

    launched = []
    for names in ("rtn", "rtn", "rtn nf4 wanda", "rtn nf4 wanda"):
        found = Found(tmp_path, poor, space=space_of(names), convergence=Convergence(3))
        found.search.run()
        launched.append(len(found.launched))
    assert launched == [4, 0, 3, 0]


def test_what_was_cut_off_and_is_left_out_now_does_not_run_again(tmp_path: Path, log_lines: list[str]) -> None:
    found = Found(tmp_path, budget=Budget(trials=1), space=space_of("rtn nf4"))
    found.search.run()
    for strategy in (Strategy(("nf4",)), Strategy(("rtn",), {"method.rtn.bits": 3, "method.rtn.group_size": 64})):
        assert found.study.reserve(Suggestion(strategy, "grid"), space_of("rtn nf4"))  # and then it is killed
    found.study.close()
    then = Found(tmp_path, budget=Budget(trials=3), space=space_of("rtn"))
    then.search.run()
    assert then.launched[0] == "rtn(bits=3, group_size=64)" and "nf4" not in then.launched
    assert any("1 that were cut off will run again" in line for line in log_lines)
    assert any("1 that were cut off do not run again" in line for line in log_lines)
    then.study.close()
    back = Found(tmp_path, budget=Budget(trials=4), space=space_of("rtn nf4"))
    back.search.run()
    assert back.launched == ["nf4"]


def test_a_proposal_that_is_not_in_the_space_is_refused_and_not_run(tmp_path: Path) -> None:
    class Stray:
        def ask(self, history: Any, space: Any, outlook: Any) -> Suggestion:
            asked.append(1)
            stray = [
                Strategy(("mixed",), {"method.mixed.bits": 3.0}),
                Strategy(("rtn",), {"method.rtn.bits": 2, "method.rtn.group_size": 64}),
            ]
            return (
                Suggestion(stray[len(asked) - 1], "stray") if len(asked) <= 2 else Grid().ask(history, space, outlook)
            )

    asked: list[int] = []
    found = Found(tmp_path, budget=Budget(trials=2), space=space_of("rtn", FEW), policy=Stray())
    found.search.run()
    assert found.launched == ["base", "rtn(bits=3, group_size=32)"]
    refused = [t.message for t in found.study.trials if t.reason is Reason.INFEASIBLE]
    assert refused == ["method mixed is not searched over", "method.rtn.bits=2 is not searched over, only one of 3, 4"]


def test_two_searches_with_different_spaces_share_a_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, other = (open_study("shared", url, world.OBJECTIVES, {"model": {}}) for _ in range(2))
    strategy = Strategy(("rtn",), {"method.rtn.bits": 3, "method.rtn.group_size": 64})
    assert one.reserve(Suggestion(strategy, "grid"), space_of("rtn", FEW))
    assert other.reserve(Suggestion(strategy, "grid"), space_of("rtn nf4"))  # it has not seen the first one's trial yet
    names = [sorted(trial.params) for trial in other._study.trials]
    assert names[0] == ["method.rtn.bits", "method.rtn.group_size", "slot.quantize"]
    assert len(names[1]) == 3 and "slot.quantize#2" not in names[1]  # the value is one that the name can hold
    assert other.reserve(Suggestion(Strategy(("nf4",)), "grid"), space_of("rtn nf4"))
    assert "slot.quantize#2" in other._study.trials[2].params
    for study in (one, other):
        study.close()
