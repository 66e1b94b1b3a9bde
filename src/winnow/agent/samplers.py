"""Proposes strategies by uniform draws, by Optuna's samplers, or from a grid.

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
from winnow.study.policy import Exhausted, Forecaster, NearbyDraw, Suggestion, untried_strategies
from winnow.study.space import Space, distributions

if TYPE_CHECKING:
    import optuna

NOTES = "optuna"  # key in the record of a decision
DRAWS = 5  # draws of a sampler that repeats tried strategies, before variations of the last one are tried
CHANGES = 200  # variations, before a random strategy is taken
MOST_DRAFTS = 50  # drafts, plus a tenth of the finished trials, before the study in memory is rebuilt


@dataclass(frozen=True)
class Random:
    """Draws uniformly: the baseline for every other policy."""

    seed: int = 0

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        rng = np.random.default_rng([self.seed, history.proposals])
        candidates = untried_strategies(history, space, rng, 16)
        return Suggestion(candidates[int(rng.integers(len(candidates)))], "random", "drawn at random")


@dataclass(frozen=True)
class Grid:
    """Proposes every strategy once; ranges of numbers take `points` values."""

    points: int = 3
    seed: int = 0

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        for strategy in space.all(self.points):
            if strategy.overrides not in history.proposed:
                return Suggestion(strategy, "grid", "next on the grid")
        raise Exhausted("every strategy of the grid was tried")


@dataclass
class Sampler:
    """Runs a sampler of Optuna on its own study in memory, with the finished trials in the space and the sampler's drafts.

    A stopped trial counts there as complete with its estimates.
    """

    seed: int = 0
    _mirror: Any = field(default=None, init=False, repr=False)
    _finished: list[Any] = field(default_factory=list, init=False, repr=False)  # as Optuna trials
    _processed: int = field(default=0, init=False, repr=False)
    _drafts: int = field(default=0, init=False, repr=False)  # failed trials in `_mirror`

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """Returns a new sampler of Optuna."""
        raise NotImplementedError

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the sampler's next untried draw; a variation of its draw, or a random strategy, if it repeats tried ones."""
        import optuna

        name = type(self).__name__.lower()
        study = self._synchronised(history, space)
        # a new sampler for each proposal, seeded by the number of proposals: a resumed search continues as if not interrupted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = self.sampler(self.seed + history.proposals)
        for _ in range(DRAWS):
            draft = study.ask()
            strategy = space.draw(draft)
            # what the sampler needs to find in the finished trial, such as its generation
            notes = study._storage.get_trial_system_attrs(draft._trial_id)
            study.tell(draft, state=optuna.trial.TrialState.FAIL)
            self._drafts += 1
            if strategy.overrides not in history.proposed and not forecaster.infeasible_reason(strategy):
                return Suggestion(strategy, name, "drawn by Optuna's sampler", record={NOTES: notes})
        rng = np.random.default_rng([self.seed, history.proposals])
        for _ in range(CHANGES):
            nearby = space.draw(NearbyDraw(rng, space.parameters(strategy)))
            if nearby.overrides not in history.proposed and not forecaster.infeasible_reason(nearby):
                return Suggestion(nearby, name, "like one that Optuna's sampler comes back to", record={NOTES: notes})
        candidates = untried_strategies(history, space, rng, 16)
        chosen = candidates[int(rng.integers(len(candidates)))]
        return Suggestion(chosen, name, "drawn at random: all that is like what the sampler comes back to was tried")

    def _synchronised(self, history: History, space: Space) -> optuna.Study:
        """Returns the study in memory with all finished trials of the history that are in the space."""
        import optuna

        all_distributions, new = distributions(space), []
        for trial in history.trials[self._processed :]:
            if space.contains(trial.strategy) and (values := self._values(trial, history)) is not None:
                parameters = space.parameters(trial.strategy)
                new.append(
                    optuna.trial.create_trial(
                        params=parameters,
                        distributions={name: all_distributions[name] for name in parameters},
                        values=values,
                        system_attrs=trial.decision.get(NOTES),
                    )
                )
        self._finished += new
        self._processed = len(history.trials)
        # drafts cannot be removed, and each slows the sampler down: rebuild the study when there are too many
        if self._mirror is None or self._drafts > MOST_DRAFTS + len(self._finished) // 10:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._mirror = optuna.create_study(directions=[o.direction for o in history.objectives])
            self._drafts, new = 0, self._finished
        study: optuna.Study = self._mirror
        study.add_trials(new)
        return study

    def _values(self, trial: Trial, history: History) -> list[float] | None:
        """Returns the objective values of a trial, estimates included; None if one is missing or not finite."""
        figures = {**trial.figures, **({} if trial.complete else trial.estimates)}
        names = [objective.name for objective in history.objectives]
        values = [figures.get(name) for name in names]
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
