"""Several agents under a bandit: each is asked as often as its proposals have paid, in hypervolume for time spent.

python search.py agent=portfolio
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from winnow.agent.bandit import Rates, recent
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Policy, Suggestion
from winnow.study.space import Space

_GOLDEN = (5**0.5 - 1) / 2


@runtime_checkable
class Judge(Protocol):
    """An agent that can say what a strategy would gain."""

    def gains(
        self, history: History, space: Space, outlook: Forecaster, candidates: Sequence[Strategy]
    ) -> np.ndarray: ...

    def is_ready(self, history: History, space: Space) -> bool: ...


@dataclass
class Portfolio:
    """A mixture that begins with given shares; what an agent earns moves them, down to `floor`.

    Proposals are dealt out evenly by these shares: few are made, and were the next agent drawn by chance, one with 30 % of them
    would have no say in the first three of every third search.

    The first agent that can judge (`gp`) is asked at each proposal what it would have done instead, and what it expects of the
    proposal of another. One from which it expects next to nothing is not tried, and its agent's share falls: so a bad adviser
    is soon asked seldom, and costs little until then.

    Attributes:
        agents: by name.
        shares: that they begin with, by name; those of the agents that there are, are scaled to a sum of 1.
        floor: the least share of each.
        veto: of the judge's own expected gain; a proposal with less is not tried. 0: all are.
        memory: the weight that each earlier trial keeps when another ends.
    """

    agents: Mapping[str, Policy]
    shares: Mapping[str, float]
    seed: int = 0
    floor: float = 0.05
    veto: float = 0.02
    memory: float = 0.97

    def __post_init__(self) -> None:
        if not self.agents:
            raise UserError("agent.agents is empty; give at least one, e.g. agent=portfolio")
        if any(self.shares.get(name, 0) <= 0 for name in self.agents):
            raise UserError(f"agent.shares must have a positive share for each of {', '.join(self.agents)}")

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        """The suggestion of one of the agents.

        Raises:
            Exhausted: none of them has another.
        """
        shares = self.current(history)
        for name in _turns(shares, _place(self.seed, history.proposals)):
            try:
                found = self.agents[name].ask(history, space, outlook)
            except Exhausted as end:
                last = end
                continue
            return self._judged(name, found, shares, history, space, outlook)
        raise last

    def current(self, history: History) -> dict[str, float]:
        """The share of each agent now: what it began with, times what it gains a second."""
        took = {t.number: (t.decision["agent"],) for t in recent(history) if t.decision.get("agent") in self.agents}
        rates = Rates.of(history, took, self.memory)
        vetoes = dict.fromkeys(self.agents, 0.0)
        for age, trial in enumerate(reversed(recent(history))):
            vetoed = trial.decision.get("vetoed")
            if vetoed and vetoed["of"] in vetoes:
                vetoes[vetoed["of"]] += self.memory**age
        raw = {name: self.shares[name] * rates.mean(name) / (1 + vetoes[name]) for name in self.agents}
        total = sum(raw.values())
        floored = {name: max(self.floor, value / total) for name, value in raw.items()}
        return {name: value / sum(floored.values()) for name, value in floored.items()}

    def _judged(
        self,
        name: str,
        found: Suggestion,
        shares: Mapping[str, float],
        history: History,
        space: Space,
        outlook: Forecaster,
    ) -> Suggestion:
        record: dict[str, Any] = {**found.record, "agent": name, "shares": {k: round(v, 4) for k, v in shares.items()}}
        judge, policy = next(((n, p) for n, p in self.agents.items() if isinstance(p, Judge)), (None, None))
        if judge is None or judge == name or not isinstance(policy, Judge) or not policy.is_ready(history, space):
            return replace(found, record=record)
        own = self.agents[judge].ask(history, space, outlook)
        record["instead"] = list(own.strategy.overrides)
        if self.veto and own.expected_gain:
            expected = float(policy.gains(history, space, outlook, [found.strategy])[0])
            if expected < self.veto * own.expected_gain:
                record |= {
                    "agent": judge,
                    "vetoed": {"by": judge, "of": name, "strategy": list(found.strategy.overrides)},
                }
                return replace(own, record={**own.record, **record})
        return replace(found, record=record)


def _place(seed: int, turn: int) -> float:
    """A place in [0, 1): those of successive turns are spread evenly, however many there are (Weyl 1916; the golden ratio)."""
    return float((np.random.default_rng([seed, 1]).random() + turn * _GOLDEN) % 1)


def _turns(shares: Mapping[str, float], place: float) -> list[str]:
    """All names: first the one in whose share the place lies, then those with larger shares first."""
    ends = np.cumsum(list(shares.values()))
    first = list(shares)[min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(shares) - 1)]
    return [first, *sorted((name for name in shares if name != first), key=lambda name: -shares[name])]
