"""Chooses the option of each slot to try next, by the hypervolume that it has gained per second.

python search.py agent=bandit
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from winnow.core.types import Strategy, Trial
from winnow.study.history import History
from winnow.study.policy import Forecaster, Suggestion, untried_strategies
from winnow.study.space import NONE, Space

RECENT = 1000  # trials; a weight of 0.97 to this power is negligible


@dataclass(frozen=True)
class Rates:
    """The gain per second of options, as Gamma posteriors: gains count as events, in units of their mean, at a rate over time.

    Attributes:
        memory: the factor on the weight of earlier trials whenever another ends, since early gains are easier.
    """

    memory: float = 0.97
    _gained: dict[object, float] = field(default_factory=lambda: defaultdict(float))
    _seconds: dict[object, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, history: History, options: Mapping[int, tuple[object, ...]], memory: float) -> Rates:
        """Returns the rates from finished trials; `options` are those of each trial, by its number."""
        rates = cls(memory)
        trials = [t for t in recent(history) if t.number in options]
        gain = max(1e-12, float(np.mean([history.gains[t.number] for t in trials]))) if trials else 1.0
        second = max(1e-9, float(np.mean([t.seconds.get("total", 0.0) for t in trials]))) if trials else 1.0
        for age, trial in enumerate(reversed(trials)):
            for option in options[trial.number]:
                rates._gained[option] += memory**age * history.gains[trial.number] / gain
                rates._seconds[option] += memory**age * trial.seconds.get("total", 0.0) / second
        return rates

    def mean(self, option: object) -> float:
        """Returns the mean of the option's posterior."""
        return (1 + self._gained.get(option, 0.0)) / (1 + self._seconds.get(option, 0.0))

    def sample(self, option: object, rng: np.random.Generator) -> float:
        """Samples a rate from the option's posterior (Thompson 1933)."""
        return float(rng.gamma(1 + self._gained.get(option, 0.0)) / (1 + self._seconds.get(option, 0.0)))


@dataclass(frozen=True)
class Bandit:
    """Thompson sampling over the options of each slot; knobs are random, in half of the cases near those of the front."""

    seed: int = 0
    memory: float = 0.97
    pool: int = 64

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        rng = np.random.default_rng([self.seed, history.proposals])
        trials = [t for t in recent(history) if not t.failed and space.contains(t.strategy)]
        options = {t.number: tuple(options_by_slot(space, t.strategy).items()) for t in trials}
        rates = Rates.of(history, options, self.memory)
        slots = [(slot, [NONE, *(m.name for m in methods)]) for slot, methods in space.slots()]
        sampled = {(slot.name, name): rates.sample((slot.name, name), rng) for slot, names in slots for name in names}
        candidates = [
            s for s in untried_strategies(history, space, rng, self.pool) if not forecaster.infeasible_reason(s)
        ]
        candidates = candidates or untried_strategies(history, space, rng, self.pool)
        values = [sum(sampled[option] for option in options_by_slot(space, s).items()) for s in candidates]
        best = max(values)
        ties = [s for s, value in zip(candidates, values, strict=True) if value > best - 1e-12]
        strategy = ties[int(rng.integers(len(ties)))]
        why = ", ".join(f"{slot.lower()}: {name}" for slot, name in options_by_slot(space, strategy).items())
        return Suggestion(strategy, "bandit", f"the options that promise most a second ({why})")


def recent(history: History) -> Sequence[Trial]:
    """Returns the trials whose weight is not negligible."""
    return history.trials[-RECENT:]


def options_by_slot(space: Space, strategy: Strategy) -> dict[str, str]:
    """Returns the option that a strategy has in each slot."""
    methods = {space.method(name).slot: name for name in strategy.methods}
    return {slot.name: methods.get(slot, NONE) for slot, _ in space.slots()}
