"""Who is asked next: evenly by the shares, which move to those that gain, and away from those whose advice is refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from tests.agent.histories import OBJECTIVES, add, outlook, rtn, space_of
from winnow.agent.portfolio import Portfolio
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Suggestion
from winnow.study.space import Space


@dataclass
class Says:
    """An agent that has strategies to suggest, or nothing."""

    name: str
    strategies: tuple[Strategy, ...] = (rtn(3),)

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        if not self.strategies:
            raise Exhausted(f"{self.name} has nothing to say")
        return Suggestion(self.strategies[0], self.name)


def portfolio(seed: int = 0, **shares: float) -> Portfolio:
    return Portfolio({name: Says(name) for name in shares}, shares, seed)


@pytest.mark.parametrize("seed", range(20))
def test_proposals_are_dealt_out_evenly(seed: int) -> None:
    history, policy = History(OBJECTIVES), portfolio(seed, llm=0.3, gp=0.7)
    asked = []
    for number in range(200):
        asked.append(policy.ask(history, space_of(), outlook()).by)
        history.begin(number, rtn(2, 32 * number + 32))
    turns = [place for place, name in enumerate(asked) if name == "llm"]
    assert asked.count("llm") == pytest.approx(60, abs=2)
    assert turns[0] < 4 and all(2 <= later - earlier <= 5 for earlier, later in itertools.pairwise(turns))


def test_one_that_has_nothing_to_say_is_passed_over() -> None:
    policy = portfolio(llm=0.3, gp=0.7)
    policy.agents["gp"].strategies = ()
    assert policy.ask(History(OBJECTIVES), space_of(), outlook()).by == "llm"
    policy.agents["llm"].strategies = ()
    with pytest.raises(Exhausted):
        policy.ask(History(OBJECTIVES), space_of(), outlook())


def test_shares_go_to_those_that_gain_for_the_time_that_they_take() -> None:
    history, policy = History(OBJECTIVES), portfolio(llm=0.3, gp=0.7)
    add(history, Strategy(), {"accuracy": 0.9, "size_bytes": 1000.0}, seconds={"total": 10.0})
    assert policy.current(history) == pytest.approx({"llm": 0.3, "gp": 0.7})
    for step in range(4):
        better = {"accuracy": 0.9, "size_bytes": 900.0 - 100 * step}
        worse = {"accuracy": 0.5, "size_bytes": 990.0}
        add(history, rtn(2, 32 + step), better, seconds={"total": 10.0}, decision={"agent": "llm"})
        add(history, rtn(3, 32 + step), worse, seconds={"total": 10.0}, decision={"agent": "gp"})
    gained = policy.current(history)
    assert gained["llm"] > 0.5
    for step in range(30):
        add(history, rtn(8, 32 + step), worse, seconds={"total": 100.0}, decision={"agent": "llm"})
    assert policy.current(history)["llm"] < gained["llm"] / 2


def test_an_adviser_whose_advice_is_refused_is_asked_seldom_but_asked() -> None:
    history, policy = History(OBJECTIVES), portfolio(llm=0.3, gp=0.7)
    add(history, Strategy(), {"accuracy": 0.9, "size_bytes": 1000.0})
    for step in range(40):
        refused = {"agent": "gp", "vetoed": {"by": "gp", "of": "llm", "strategy": ["method=[rtn]"]}}
        add(history, rtn(3, 32 + step), {"accuracy": 0.5, "size_bytes": 990.0 - step}, decision=refused)
    assert policy.current(history)["llm"] == pytest.approx(policy.floor, rel=0.1)
