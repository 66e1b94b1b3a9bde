"""Policies that need no language model of their own making: uniform draws, Optuna's samplers, and the grid.

python search.py agent=nsga2
python search.py agent=grid agent.points=3
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.core.types import Trial
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Near, Suggestion, fresh
from winnow.study.space import Space, distributions

if TYPE_CHECKING:
    import optuna

NOTES = "optuna"  # in the record of a decision
DRAWS = 5  # by a sampler that comes back to what was tried, before one of them is changed a little
CHANGES = 200  # before plain chance decides
MOST_DRAFTS = 50  # beside a tenth as many as there are finished trials, before they are swept out


@dataclass(frozen=True)
class Random:
    """Uniform draws: the measure that every other policy is held against."""

    seed: int = 0

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        rng = np.random.default_rng([self.seed, history.proposals])
        candidates = fresh(history, space, rng, 16)
        return Suggestion(candidates[int(rng.integers(len(candidates)))], "random", "drawn at random")


@dataclass(frozen=True)
class Grid:
    """Every strategy once, numbers at `points` values each."""

    points: int = 3
    seed: int = 0

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        for strategy in space.all(self.points):
            if strategy.overrides not in history.seen:
                return Suggestion(strategy, "grid", "next on the grid")
        raise Exhausted("every strategy of the grid was tried")


@dataclass
class Sampler:
    """A sampler of Optuna, which works on a study of its own in memory: the finished trials of the history that are of the
    space, and its drafts.

    A trial that was stopped counts there as complete with its estimates, since samplers know no more of it than that.
    """

    seed: int = 0
    _mirror: Any = field(default=None, init=False, repr=False)
    _finished: list[Any] = field(default_factory=list, init=False, repr=False)  # as Optuna has them
    _told: int = field(default=0, init=False, repr=False)
    _drafts: int = field(default=0, init=False, repr=False)

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        raise NotImplementedError

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        """The sampler's next draw that was not tried; one like it where it keeps to what was."""
        import optuna

        name = type(self).__name__.lower()
        study = self._synced(history, space)
        # made anew for each proposal, from what was proposed so far: a search that is resumed goes on as it would have
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = self.sampler(self.seed + history.proposals)
        for _ in range(DRAWS):
            draft = study.ask()
            strategy = space.draw(draft)
            # what the sampler wants to find at the finished trial, its generation say
            notes = study._storage.get_trial_system_attrs(draft._trial_id)
            study.tell(draft, state=optuna.trial.TrialState.FAIL)
            self._drafts += 1
            if strategy.overrides not in history.seen and not outlook.infeasible_reason(strategy):
                return Suggestion(strategy, name, "drawn by Optuna's sampler", record={NOTES: notes})
        rng = np.random.default_rng([self.seed, history.proposals])
        for _ in range(CHANGES):
            near = space.draw(Near(rng, space.parameters(strategy)))
            if near.overrides not in history.seen and not outlook.infeasible_reason(near):
                return Suggestion(near, name, "like one that Optuna's sampler comes back to", record={NOTES: notes})
        candidates = fresh(history, space, rng, 16)
        chosen = candidates[int(rng.integers(len(candidates)))]
        return Suggestion(chosen, name, "drawn at random: all that is like what the sampler comes back to was tried")

    def _synced(self, history: History, space: Space) -> optuna.Study:
        import optuna

        known, new = distributions(space), []
        for trial in history.trials[self._told :]:
            if space.holds(trial.strategy) and (values := self._values(trial, history)) is not None:
                chosen = space.parameters(trial.strategy)
                mine = {name: known[name] for name in chosen}
                notes = trial.decision.get(NOTES)
                new.append(
                    optuna.trial.create_trial(params=chosen, distributions=mine, values=values, system_attrs=notes)
                )
        self._finished += new
        self._told = len(history.trials)
        # drafts cannot be taken out again, and each costs the sampler a look: at times the finished trials begin afresh
        if self._mirror is None or self._drafts > MOST_DRAFTS + len(self._finished) // 10:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._mirror = optuna.create_study(directions=[o.direction for o in history.objectives])
            self._drafts, new = 0, self._finished
        study: optuna.Study = self._mirror
        study.add_trials(new)
        return study

    def _values(self, trial: Trial, history: History) -> list[float] | None:
        found = {**trial.figures, **({} if trial.complete else trial.estimates)}
        names = [objective.name for objective in history.objectives]
        values = [found.get(name) for name in names]
        return values if all(value is not None and math.isfinite(value) for value in values) else None  # type: ignore[return-value]


@dataclass
class TPE(Sampler):
    """Multi-objective tree-structured Parzen estimator (Ozaki et al. 2022); multivariate and grouped, for conditional knobs."""

    startup_trials: int = 10

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.TPESampler(
            n_startup_trials=self.startup_trials, multivariate=True, group=True, seed=seed
        )


@dataclass
class NSGA2(Sampler):
    """NSGA-II (Deb et al. 2002)."""

    population_size: int = 16

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(population_size=self.population_size, seed=seed)
