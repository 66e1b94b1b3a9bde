"""Policies that need no language model: Optuna's samplers, and the grid.

python search.py agent=nsga2
python search.py agent=grid agent.points=3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.search.space import Space
from winnow.search.study import Exhausted, Proposal, Study

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Random:
    """Uniform draws: the measure that every other policy is held against."""

    seed: int = 0

    def ask(self, study: Study, space: Space) -> Proposal:
        return study.propose(space, self.sampler(study), by=type(self).__name__.lower())

    def sampler(self, study: Study) -> optuna.samplers.BaseSampler:
        """Made anew for each proposal from the seed and the trials so far, so that a resumed search goes on as it would have."""
        import optuna

        return optuna.samplers.RandomSampler(seed=self.seed + study.asked)


@dataclass(frozen=True)
class TPE(Random):
    """Multi-objective tree-structured Parzen estimator (Ozaki et al. 2022); multivariate and grouped, for conditional knobs."""

    startup_trials: int = 10

    def sampler(self, study: Study) -> optuna.samplers.BaseSampler:
        import warnings

        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                n_startup_trials=self.startup_trials, multivariate=True, group=True, seed=self.seed + study.asked
            )


@dataclass(frozen=True)
class NSGA2(Random):
    """NSGA-II (Deb et al. 2002)."""

    population_size: int = 16

    def sampler(self, study: Study) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(population_size=self.population_size, seed=self.seed + study.asked)


@dataclass(frozen=True)
class Grid:
    """Every strategy once, numbers at `points` values each."""

    points: int = 3
    seed: int = 0

    def ask(self, study: Study, space: Space) -> Proposal:
        for strategy in space.all(self.points):
            if strategy.overrides not in study.seen:
                return study.propose_strategy(space, strategy, by="grid")
        raise Exhausted("every strategy of the grid was tried")
