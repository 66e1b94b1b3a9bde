"""Defines the interface of policies: a history in, a suggestion out. A policy changes nothing; the search decides what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from winnow.core.types import Strategy, Trial
from winnow.study.history import History
from winnow.study.space import Space

ENUMERABLE = 2000  # up to this many strategies, policies consider the whole space


class Exhausted(Exception):
    """Nothing new is left to propose."""


@dataclass(frozen=True)
class Suggestion:
    """A strategy to try next, and why.

    Attributes:
        by: the agent that proposed it.
        expected_gain: the expected gain of hypervolume, as a share of the box that could be dominated; None if unknown.
        record: what is needed to retrace the decision: the brief's hash, what another agent would have proposed. `tokens`
            (`input` and `output`) and `usd` in it count against the budget.
        messages: the full conversation with a language model, stored as `messages.json` in the trial's folder.
    """

    strategy: Strategy
    by: str
    why: str = ""
    expected_gain: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    messages: Mapping[str, Any] = field(default_factory=dict)


class Forecaster(Protocol):
    """Predicts properties of a strategy before it runs."""

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        """Returns the figures that follow from the configuration alone, such as `size_bytes`, for each strategy; may be empty."""

    def infeasible_reason(self, strategy: Strategy) -> str:
        """Returns why it cannot be made or served here, or breaks a constraint; "" if it can be tried."""

    def seconds(self, strategy: Strategy) -> float:
        """Returns the expected duration of its trial."""

    def observe(self, trial: Trial) -> None:
        """Learns from a finished trial."""


class Policy(Protocol):
    """Proposes the next strategy."""

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the next suggestion; raises Exhausted if every strategy was tried."""


@dataclass(frozen=True)
class UniformDraw:
    """Draws uniformly at random, for `Space.draw`."""

    rng: np.random.Generator

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))
        return float(self.rng.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if log:
            return min(high, max(low, round(self.suggest_float(name, low, high, log=True))))
        return int(self.rng.integers(low, high + 1))


@dataclass(frozen=True)
class NearbyDraw(UniformDraw):
    """Draws a variation of a strategy, given by its `Space.parameters`: each choice stays with `keep_probability`."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep_probability: float = 0.75

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name in self.parameters and self.rng.random() < self.keep_probability:
            return self.parameters[name]
        return super().suggest_categorical(name, choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name in self.parameters and self.rng.random() < self.keep_probability:
            return float(self.parameters[name])
        return super().suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if name in self.parameters and self.rng.random() < self.keep_probability:
            return int(self.parameters[name])
        return super().suggest_int(name, low, high, log=log)


def untried_strategies(
    history: History, space: Space, rng: np.random.Generator, count: int, near: float = 0.5
) -> list[Strategy]:
    """Returns strategies that were not proposed: all of a small space, else `count` random ones.

    Args:
        near: the share of the random ones that are variations of a strategy on the front.

    Raises:
        Exhausted: there is none.
    """
    if (size := space.size()) is not None and size <= ENUMERABLE:
        untried = [s for s in space.all(1) if s.overrides not in history.proposed]
        if not untried:
            raise Exhausted("every strategy of the space was tried")
        return untried
    front = [space.parameters(trial.strategy) for trial in history.on_front]
    strategies: dict[tuple[str, ...], Strategy] = {}
    for attempt in range(20 * count):
        if len(strategies) == count:
            break
        vary_front = front and (attempt + 1) * near // 1 > attempt * near // 1
        draw = NearbyDraw(rng, front[int(rng.integers(len(front)))]) if vary_front else UniformDraw(rng)
        strategy = space.draw(draw)
        if strategy.overrides not in history.proposed:
            strategies[strategy.overrides] = strategy
    if not strategies:
        raise Exhausted(f"no untried strategy was found in {20 * count} draws; the space seems to be exhausted")
    return list(strategies.values())


def random_strategies(space: Space, rng: np.random.Generator, count: int) -> list[Strategy]:
    """Returns up to `count` distinct random strategies of a large space, from twice as many draws."""
    strategies = (space.draw(UniformDraw(rng)) for _ in range(2 * count))
    return list({s.overrides: s for s in strategies}.values())[:count]
