"""What is known of a search at a moment: the trials so far, their front, and what runs. All that a policy may look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from winnow.core.errors import Reason
from winnow.core.types import Objective, Strategy, Trial
from winnow.study import pareto
from winnow.study.objectives import broken

TRANSIENT = (Reason.CRASHED, Reason.LOST)  # a trial that failed so is tried once more
AGAIN = ("retried", "again")  # in the record of a proposal: the number of the trial that it repeats


def should_retry(trial: Trial) -> bool:
    """Whether a failure is one that the next attempt may not have; that of the second attempt stands."""
    return trial.reason in TRANSIENT and "retried" not in trial.decision


class History:
    """Finished trials and those under way.

    Attributes:
        limits: constraints, by figure; a trial that breaks one is complete, and never on the front.
        trials: finished ones, in the order in which they ended.
        running: by number.
        seen: overrides of all strategies that were proposed.
        front: numbers of the complete trials that no other dominates.
        gains: of each finished trial, by number: the hypervolume that it added, as a share of the box between the best and
            the worst values known by then.
        proposals: how many there were: a seed that moves on with each.
        run_trials: finished ones that were really run: those refused beforehand cost nothing, and two attempts count once.
        since_gain: of these, how many have ended since one came onto the front.
        energy_wh, co2_g: that they took, and confirmations, and trials that came to nothing.
        tokens, usd: that language models took for the proposals.
        rejected: proposals that a person has turned down.
    """

    def __init__(self, objectives: Sequence[Objective], limits: Mapping[str, float] | None = None) -> None:
        self.objectives = tuple(objectives)
        self.limits = dict(limits or {})
        self.trials: list[Trial] = []
        self.running: dict[int, Strategy] = {}
        self.seen: set[tuple[str, ...]] = set()
        self.front: tuple[int, ...] = ()
        self.gains: dict[int, float] = {}
        self.proposals = 0
        self.run_trials = 0
        self.since_gain = 0
        self.energy_wh = 0.0
        self.co2_g = 0.0
        self.tokens = 0
        self.usd = 0.0
        self.rejected: tuple[Strategy, ...] = ()
        self._on_front: list[Trial] = []
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None  # of the complete trials, less is better

    @property
    def on_front(self) -> Sequence[Trial]:
        return self._on_front

    @property
    def base(self) -> Trial | None:
        """The base model's trial, once it is finished and not about to be run again."""
        return next((t for t in self.trials if not t.strategy.methods and t.complete and not self.runs_again(t)), None)

    def disturbed(self, trial: Trial) -> list[str]:
        """The objectives of a trial whose measurement was disturbed."""
        return [o.name for o in self.objectives if trial.disturbed(o.name)]

    def runs_again(self, trial: Trial) -> bool:
        """Whether a trial is run once more: it failed as the next attempt may not, or it is the base model's, with which all are
        compared, and an objective's measurement was disturbed. What comes of the second attempt stands."""
        is_base = not trial.strategy.methods
        return should_retry(trial) or (is_base and "retried" not in trial.decision and bool(self.disturbed(trial)))

    def counts(self, trial: Trial) -> bool:
        """Whether a trial was really run, and is not run once more."""
        return trial.reason is not Reason.INFEASIBLE and not self.runs_again(trial)

    def breaks(self, trial: Trial) -> list[str]:
        """The constraints that a trial breaks, in words."""
        return broken(trial.figures, self.limits, self.base.figures if self.base else None)

    def begin(self, number: int, strategy: Strategy, record: Mapping[str, Any] | None = None) -> None:
        self.running[number] = strategy
        self.seen.add(strategy.overrides)
        self.proposals += 1
        self.spend(record or {})

    def spend(self, record: Mapping[str, Any]) -> None:
        """Counts what a proposal took of a language model; one that is made once more (`AGAIN`) was counted before."""
        if not any(mark in record for mark in AGAIN):
            used = record.get("tokens") or {}
            self.tokens += int(used.get("input", 0)) + int(used.get("output", 0))
            self.usd += float(record.get("usd") or 0.0)

    def use(self, energy: Mapping[str, float]) -> None:
        """Counts the energy of a trial, or of other work for it."""
        self.energy_wh += energy.get("wh", 0.0)
        self.co2_g += energy.get("co2_g", 0.0)

    def forget(self, number: int) -> None:
        """A proposal that came to nothing, and may be made again."""
        self.seen.discard(self.running.pop(number).overrides)

    def end(self, trial: Trial) -> None:
        """Adds a finished trial; the front is that of the front so far and the new one."""
        self.running.pop(trial.number, None)
        self.seen.add(trial.strategy.overrides)
        self.trials.append(trial)
        again = self.runs_again(trial)
        if self.counts(trial):
            self.run_trials += 1
            self.since_gain += 1
        self.use(trial.energy)
        self.gains[trial.number] = 0.0
        if trial.complete and not again and not self.breaks(trial):
            self.gains[trial.number] = self._gain(trial)
            candidates = [*self._on_front, trial]
            kept = set(pareto.front(candidates, self.objectives))
            self._on_front = [t for t in candidates if t.number in kept]
            self.front = tuple(sorted(kept))
            if trial.number in kept:
                self.since_gain = 0

    def _gain(self, trial: Trial) -> float:
        """See `gains`; also widens the bounds."""
        if self.disturbed(trial):
            return 0.0
        point = pareto.points([trial], self.objectives)[0]
        low, high = self._bounds or (point, point)
        self._bounds = low, high = np.minimum(low, point), np.maximum(high, point)
        front = pareto.points(self._on_front, self.objectives)
        return pareto.added(front, point, low, high)
