"""Chooses among several agents with a bandit: an agent whose proposals gain more hypervolume per second proposes more often.

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
    """An agent that can predict what a strategy would gain."""

    def gains(
        self, history: History, space: Space, forecaster: Forecaster, candidates: Sequence[Strategy]
    ) -> np.ndarray: ...

    def is_ready(self, history: History, space: Space) -> bool: ...


@dataclass
class Portfolio:
    """A mixture of agents that starts with fixed shares; the gains of each agent then change its share, down to `floor`.

    Proposals are spread evenly by these shares instead of at random: a search has few proposals, and with random draws an agent
    with a share of 30 % would make none of the first three proposals in every third search.

    For each proposal the first agent that can judge (`gp`) says what it would propose instead, and what it expects of the
    proposal. A proposal with almost no expected gain is not tried, and the share of its agent falls: so a bad agent is soon
    asked rarely, and costs little until then.

    Attributes:
        agents: the agents by name.
        shares: the initial shares by name; the shares of `agents` are scaled to a sum of 1.
        floor: the smallest share of an agent.
        veto: a share of the judge's own expected gain; a proposal with less is not tried. 0 means no veto.
        memory: the factor on the weight of earlier trials whenever another ends.
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

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the suggestion of one of the agents.

        Raises:
            Exhausted: no agent has another suggestion.
        """
        shares = self.current(history)
        for name in _order(shares, _position(self.seed, history.proposals)):
            try:
                suggestion = self.agents[name].ask(history, space, forecaster)
            except Exhausted as end:
                last = end
                continue
            return self._judged(name, suggestion, shares, history, space, forecaster)
        raise last

    def current(self, history: History) -> dict[str, float]:
        """Returns the current share of each agent: its initial share times its gain per second."""
        agents = {t.number: (t.decision["agent"],) for t in recent(history) if t.decision.get("agent") in self.agents}
        rates = Rates.of(history, agents, self.memory)
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
        suggestion: Suggestion,
        shares: Mapping[str, float],
        history: History,
        space: Space,
        forecaster: Forecaster,
    ) -> Suggestion:
        """Returns the suggestion with its record, or the judge's own if the judge vetoes it."""
        rounded = {agent: round(share, 4) for agent, share in shares.items()}
        record: dict[str, Any] = {**suggestion.record, "agent": name, "shares": rounded}
        judge, policy = next(((n, p) for n, p in self.agents.items() if isinstance(p, Judge)), (None, None))
        if judge is None or judge == name or not isinstance(policy, Judge) or not policy.is_ready(history, space):
            return replace(suggestion, record=record)
        own = self.agents[judge].ask(history, space, forecaster)
        record["instead"] = list(own.strategy.overrides)
        if self.veto and own.expected_gain:
            expected = float(policy.gains(history, space, forecaster, [suggestion.strategy])[0])
            if expected < self.veto * own.expected_gain:
                record |= {
                    "agent": judge,
                    "vetoed": {"by": judge, "of": name, "strategy": list(suggestion.strategy.overrides)},
                }
                return replace(own, record={**own.record, **record})
        return replace(suggestion, record=record)


def _position(seed: int, turn: int) -> float:
    """Returns a position in [0, 1); those of successive turns are evenly spread (Weyl 1916, with the golden ratio)."""
    return float((np.random.default_rng([seed, 1]).random() + turn * _GOLDEN) % 1)


def _order(shares: Mapping[str, float], position: float) -> list[str]:
    """Returns all names: first the one whose share contains the position, then the others by falling share."""
    ends = np.cumsum(list(shares.values()))
    first = list(shares)[min(int(np.searchsorted(ends, position * ends[-1], side="right")), len(shares) - 1)]
    return [first, *sorted((name for name in shares if name != first), key=lambda name: -shares[name])]
