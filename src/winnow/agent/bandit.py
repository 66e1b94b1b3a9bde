"""Which option of each slot to try next, by the hypervolume that it has gained for the time that it took.

python search.py agent=bandit
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from winnow.core.types import Strategy, Trial
from winnow.study.history import History
from winnow.study.policy import Forecaster, Suggestion, fresh
from winnow.study.space import NONE, Space

RECENT = 1000  # trials: 0.97 to this power is nothing


@dataclass(frozen=True)
class Rates:
    """What options gain a second, as Gamma posteriors: gains come like counts, in units of their mean, at a rate per unit of time.

    Attributes:
        memory: the weight that each earlier trial keeps when another ends: what was easy to gain at first is gained.
    """

    memory: float = 0.97
    _gained: dict[object, float] = field(default_factory=lambda: defaultdict(float))
    _seconds: dict[object, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, history: History, options: Mapping[int, tuple[object, ...]], memory: float) -> Rates:
        """From finished trials; `options`: those that each of them took, by number."""
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
        return (1 + self._gained.get(option, 0.0)) / (1 + self._seconds.get(option, 0.0))

    def drawn(self, option: object, rng: np.random.Generator) -> float:
        """A rate that the option may have (Thompson 1933)."""
        return float(rng.gamma(1 + self._gained.get(option, 0.0)) / (1 + self._seconds.get(option, 0.0)))


@dataclass(frozen=True)
class Bandit:
    """Thompson sampling over the options of each slot; knobs are drawn, half of the time near those of the front."""

    seed: int = 0
    memory: float = 0.97
    pool: int = 64

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        rng = np.random.default_rng([self.seed, history.proposals])
        told = [t for t in recent(history) if not t.failed and space.holds(t.strategy)]
        taken = {t.number: tuple(chosen(space, t.strategy).items()) for t in told}
        rates = Rates.of(history, taken, self.memory)
        slots = [(slot, [NONE, *(m.name for m in methods)]) for slot, methods in space.slots()]
        drawn = {(slot.name, name): rates.drawn((slot.name, name), rng) for slot, names in slots for name in names}
        candidates = [s for s in fresh(history, space, rng, self.pool) if not outlook.infeasible_reason(s)]
        candidates = candidates or fresh(history, space, rng, self.pool)
        values = [sum(drawn[option] for option in chosen(space, s).items()) for s in candidates]
        best = max(values)
        ties = [s for s, value in zip(candidates, values, strict=True) if value > best - 1e-12]
        strategy = ties[int(rng.integers(len(ties)))]
        why = ", ".join(f"{slot.lower()}: {name}" for slot, name in chosen(space, strategy).items())
        return Suggestion(strategy, "bandit", f"the options that promise most a second ({why})")


def recent(history: History) -> Sequence[Trial]:
    """The trials that still have any weight."""
    return history.trials[-RECENT:]


def chosen(space: Space, strategy: Strategy) -> dict[str, str]:
    """The option that a strategy takes in each slot."""
    named = {space.method(name).slot: name for name in strategy.methods}
    return {slot.name: named.get(slot, NONE) for slot, _ in space.slots()}
