"""Keeps the state of a search that policies may read: the trials so far, their front, and the running trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from winnow.core.errors import Reason
from winnow.core.types import Objective, Strategy, Trial
from winnow.study import pareto
from winnow.study.objectives import broken_constraints

TRANSIENT = (Reason.CRASHED, Reason.LOST)  # a trial that failed for one of these is tried once more
REPEAT_MARKS = ("retried", "again")  # keys in the record of a proposal that hold the number of the trial it repeats


def should_retry(trial: Trial) -> bool:
    """Returns True if a trial failed for a reason that a second attempt may not meet; there is no third attempt."""
    return trial.reason in TRANSIENT and "retried" not in trial.decision


class History:
    """The finished and the running trials of a search.

    Attributes:
        limits: constraints, by figure; a trial that breaks one is complete, and never on the front.
        trials: finished trials, in the order in which they ended.
        running: strategies of the running trials, by number.
        proposed: overrides of all strategies that were proposed.
        front: numbers of the complete trials that no other dominates.
        gains: the hypervolume that each finished trial added, by number, as a share of the box between the best and the worst
            values at that time.
        proposals: the number of proposals, which also serves as a seed.
        run_trials: finished trials that were run: infeasible ones cost nothing, and two attempts count once.
        since_gain: the number of these since the last trial that came onto the front.
        energy_wh, co2_g: used by trials, confirmations, and trials without an outcome.
        tokens, usd: used by language models for the proposals.
        rejected: strategies that a person has rejected.
    """

    def __init__(self, objectives: Sequence[Objective], limits: Mapping[str, float] | None = None) -> None:
        self.objectives = tuple(objectives)
        self.limits = dict(limits or {})
        self.trials: list[Trial] = []
        self.running: dict[int, Strategy] = {}
        self.proposed: set[tuple[str, ...]] = set()
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
        # best and worst values of the complete trials, signed so that less is better
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def on_front(self) -> Sequence[Trial]:
        """The trials of the front."""
        return self._on_front

    @property
    def base(self) -> Trial | None:
        """The base model's trial; None until it is finished, or if it will run again."""
        return next((t for t in self.trials if not t.strategy.methods and t.complete and not self.runs_again(t)), None)

    def disturbed(self, trial: Trial) -> list[str]:
        """Returns the objectives of a trial whose measurement was disturbed."""
        return [o.name for o in self.objectives if trial.disturbed(o.name)]

    def runs_again(self, trial: Trial) -> bool:
        """Returns True if a trial is run once more, which happens only once.

        A trial runs again if it failed for a reason that may not recur, or if it is the base model's, with which all others are
        compared, and the measurement of an objective was disturbed.
        """
        is_base = not trial.strategy.methods
        return should_retry(trial) or (is_base and "retried" not in trial.decision and bool(self.disturbed(trial)))

    def counts_as_run(self, trial: Trial) -> bool:
        """Returns True if a trial was run, and does not run again."""
        return trial.reason is not Reason.INFEASIBLE and not self.runs_again(trial)

    def broken_constraints(self, trial: Trial) -> list[str]:
        """Returns the constraints that a trial breaks, in words."""
        return broken_constraints(trial.figures, self.limits, self.base.figures if self.base else None)

    def begin(self, number: int, strategy: Strategy, record: Mapping[str, Any] | None = None) -> None:
        """Adds a running trial."""
        self.running[number] = strategy
        self.proposed.add(strategy.overrides)
        self.proposals += 1
        self.add_llm_usage(record or {})

    def add_llm_usage(self, record: Mapping[str, Any]) -> None:
        """Counts a proposal's tokens and cost of a language model; a repeated proposal (`REPEAT_MARKS`) was counted before."""
        if not any(mark in record for mark in REPEAT_MARKS):
            used = record.get("tokens") or {}
            self.tokens += int(used.get("input", 0)) + int(used.get("output", 0))
            self.usd += float(record.get("usd") or 0.0)

    def add_energy(self, energy: Mapping[str, float]) -> None:
        """Counts the energy of a trial, or of other work of the search."""
        self.energy_wh += energy.get("wh", 0.0)
        self.co2_g += energy.get("co2_g", 0.0)

    def end(self, trial: Trial) -> None:
        """Adds a finished trial and updates the front."""
        self.running.pop(trial.number, None)
        self.proposed.add(trial.strategy.overrides)
        self.trials.append(trial)
        runs_again = self.runs_again(trial)
        if self.counts_as_run(trial):
            self.run_trials += 1
            self.since_gain += 1
        self.add_energy(trial.energy)
        self.gains[trial.number] = 0.0
        if trial.complete and not runs_again and not self.broken_constraints(trial):
            self.gains[trial.number] = self._gain(trial)
            candidates = [*self._on_front, trial]
            front = set(pareto.front(candidates, self.objectives))
            self._on_front = [t for t in candidates if t.number in front]
            self.front = tuple(sorted(front))
            if trial.number in front:
                self.since_gain = 0

    def _gain(self, trial: Trial) -> float:
        """Returns the gain of a trial (see `gains`) and widens the bounds to contain it."""
        if self.disturbed(trial):
            return 0.0
        point = pareto.points([trial], self.objectives)[0]
        low, high = self._bounds or (point, point)
        self._bounds = low, high = np.minimum(low, point), np.maximum(high, point)
        front = pareto.points(self._on_front, self.objectives)
        return pareto.hypervolume_gain(front, point, low, high)
