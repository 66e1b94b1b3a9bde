"""What every policy is given and gives: a history in, a suggestion out. It changes nothing; the search decides what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from winnow.core.types import Strategy, Trial
from winnow.study.history import History
from winnow.study.space import Space

ENUMERABLE = 2000  # a space of so many strategies is looked at whole


class Exhausted(Exception):
    """Nothing new is left to propose."""


@dataclass(frozen=True)
class Suggestion:
    """A strategy to try next, and why.

    Attributes:
        by: the agent whose idea it was.
        expected_gain: of hypervolume, as a share of all that could be dominated; None where the agent does not say.
        record: what it takes to retrace the decision: the brief's hash, what another agent would have proposed. `tokens`
            (`input` and `output`) and `usd` in it count against the budget.
        messages: what was said with a language model, whole; it is kept as `messages.json` in the trial's folder.
    """

    strategy: Strategy
    by: str
    why: str = ""
    expected_gain: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    messages: Mapping[str, Any] = field(default_factory=dict)


class Forecaster(Protocol):
    """What can be told of a strategy before it runs."""

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        """Of each, those that follow from the configuration alone, such as `size_bytes`; empty where none does."""

    def infeasible_reason(self, strategy: Strategy) -> str:
        """Why it cannot be made or served here, or breaks a constraint; empty where it can be tried."""

    def seconds(self, strategy: Strategy) -> float:
        """What it is expected to take."""

    def observe(self, trial: Trial) -> None:
        """Is told of every finished trial."""


class Policy(Protocol):
    """Who proposes the next strategy."""

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        """Raises Exhausted if there is no strategy that was not tried."""


@dataclass(frozen=True)
class Draw:
    """Uniform choices, for `Space.draw`."""

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
class Near(Draw):
    """Like `Draw`, but most choices are those of a strategy, given by its `Space.parameters`."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    kept: float = 0.75

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name in self.parameters and self.rng.random() < self.kept:
            return self.parameters[name]
        return super().suggest_categorical(name, choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name in self.parameters and self.rng.random() < self.kept:
            return float(self.parameters[name])
        return super().suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if name in self.parameters and self.rng.random() < self.kept:
            return int(self.parameters[name])
        return super().suggest_int(name, low, high, log=log)


def fresh(history: History, space: Space, rng: np.random.Generator, count: int, near: float = 0.5) -> list[Strategy]:
    """Strategies that were not proposed: all of a small space, else `count`, a share `near` of them like one on the front.

    Raises:
        Exhausted: there is none.
    """
    if (size := space.size()) is not None and size <= ENUMERABLE:
        found = [s for s in space.all(1) if s.overrides not in history.seen]
        if not found:
            raise Exhausted("every strategy of the space was tried")
        return found
    front = [space.parameters(trial.strategy) for trial in history.on_front]
    made: dict[tuple[str, ...], Strategy] = {}
    for attempt in range(20 * count):
        if len(made) == count:
            break
        alike = front and (attempt + 1) * near // 1 > attempt * near // 1
        strategy = space.draw(Near(rng, front[int(rng.integers(len(front)))]) if alike else Draw(rng))
        if strategy.overrides not in history.seen:
            made[strategy.overrides] = strategy
    if not made:
        raise Exhausted(f"no untried strategy was found in {20 * count} draws; the space seems to be exhausted")
    return list(made.values())


def drawn(space: Space, rng: np.random.Generator, count: int) -> list[Strategy]:
    """So many strategies of a large space at random; less where they repeat themselves."""
    found = (space.draw(Draw(rng)) for _ in range(2 * count))
    return list({s.overrides: s for s in found}.values())[:count]
