"""What holds for every agent of `conf/agent`: it proposes strategies of the space that were not tried, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.agent import world
from tests.test_conf import composed
from winnow.build import instantiate
from winnow.core.cli import options
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Policy
from winnow.study.space import Space, distributions

AGENTS = [name for name in options("agent") if name not in ("llm", "gpt4o", "local_llm", "claude", "gemini", "replay")]


def made(name: str, *changes: str) -> Policy:
    cfg = composed("search", f"agent={name}", *changes)
    policy: Policy = instantiate(cfg.agent, "agent")
    return policy


def belongs(space: Space, strategy: Strategy) -> bool:
    """Whether a strategy is one of the space: its methods in order, each with just its own knobs, within their ranges."""
    slots = [space.method(name).slot for name in strategy.methods]
    known = distributions(space)
    for name in strategy.methods:
        own = {k: v for k, v in strategy.knobs.items() if k.startswith(f"method.{name}.")}
        active = {d.key for d in space.method(name).dimensions if all(own.get(k, v) == v for k, v in d.when.items())}
        if set(own) != active:
            return False
    inside = all(known[k]._contains(known[k].to_internal_repr(v)) for k, v in strategy.knobs.items())
    return inside and slots == sorted(set(slots)) and {k.split(".")[1] for k in strategy.knobs} <= set(strategy.methods)


@pytest.mark.parametrize("name", AGENTS)
def test_it_proposes_strategies_of_the_space_that_were_not_tried(name: str) -> None:
    space = world.spacious()
    history = world.searched(made(name), space, 25)
    assert len({t.strategy.overrides for t in history.trials}) == 25
    assert all(belongs(space, t.strategy) for t in history.trials)
    assert all(t.decision["why"] for t in history.trials[1:])


@pytest.mark.parametrize("name", AGENTS)
def test_it_looks_and_changes_nothing(name: str) -> None:
    space, outlook = world.narrow(), world.Known()
    policy = made(name)
    history = world.searched(policy, space, 12, outlook)
    before = copy.deepcopy(history)
    first = policy.ask(history, space, outlook)
    assert (history.trials, history.proposed, history.running, history.proposals) == (
        before.trials, before.proposed, before.running, before.proposals
    )  # fmt: skip
    assert policy.ask(history, space, outlook).strategy == first.strategy  # asked again, it says the same


@pytest.mark.parametrize("name", AGENTS)
def test_a_search_that_is_resumed_goes_on_as_it_would_have(name: str) -> None:
    space = world.narrow()
    whole = world.searched(made(name), space, 16)
    policy, outlook, history = made(name), world.Known(), History(world.OBJECTIVES)
    for trial in whole.trials[:12]:  # as another process finds them in the storage
        history.begin(trial.number, trial.strategy)
        history.end(trial)
        outlook.observe(trial)
    assert policy.ask(history, space, outlook).strategy == whole.trials[12].strategy


@pytest.mark.parametrize("name", AGENTS)
def test_it_finishes_a_small_space_and_says_so(name: str) -> None:
    space = world.narrow()
    size = space.size()
    assert size == 30
    history = world.searched(made(name), space, size)
    assert {t.strategy.overrides for t in history.trials} == {s.overrides for s in space.all(1)}
    with pytest.raises(Exhausted):
        made(name).ask(history, space, world.Known())


@pytest.mark.parametrize("name", [a for a in AGENTS if a not in ("random", "grid")])
def test_it_does_not_propose_what_is_refused_while_there_is_something_else(name: str) -> None:
    history = world.searched(made(name), world.spacious(), 20, world.Known(frozenset({"nf4"})))
    assert not any("nf4" in t.strategy.methods for t in history.trials)


def volume(history: History) -> float:
    """Of the box up to an accuracy of 0 and the base model's size."""
    import moocore

    points = [(-t.figures["accuracy"], t.figures["size_bytes"] / 16e6) for t in history.on_front]
    return float(moocore.hypervolume(points, ref=[0.0, 1.0]))


def mean_volume(name: str, trials: int, seeds: int = 4) -> float:
    return sum(volume(world.searched(made(name, f"seed={s}"), world.spacious(), trials)) for s in range(seeds)) / seeds


def test_the_surrogate_finds_more_than_chance() -> None:
    assert mean_volume("gp", 25) > mean_volume("random", 25)


def test_methods_that_keep_failing_are_left_alone() -> None:
    """Failures are seldom repeated, and the rest of the space is searched all the same."""
    space, failing = world.spacious(), frozenset({"nf4"})
    policy: Any = made("gp")
    history = world.searched(policy, space, 40, failing=failing)
    later = history.trials[20:]
    assert sum(t.failed for t in later) <= 4 and sum(t.complete for t in later) >= 16
