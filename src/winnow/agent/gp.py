"""Proposes the strategy with the largest expected hypervolume gain per second, with a Gaussian process for each objective.

python search.py agent=gp
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from winnow.agent.improvement import expected_improvement, nondominated, undominated_boxes
from winnow.agent.surrogate import Features, GaussianProcess, Settings, features, fit_settings
from winnow.core.cache import BatchCache
from winnow.core.types import Objective, Strategy, Trial
from winnow.study.history import History
from winnow.study.objectives import KL
from winnow.study.policy import ENUMERABLE, Forecaster, Suggestion, random_strategies, untried_strategies
from winnow.study.space import Space

MOST_OBSERVATIONS = 300  # at most as many per process: inference is cubic in them
ESTIMATED, GUESSED = 5.0, 30.0  # relative noise of a score on some items, and of a score inferred from the divergence
STOCK = 2048  # random strategies of a large space
MOST_CACHED = 20_000  # strategies whose features are cached
MARGIN = 0.1  # distance of the reference point past the worst value, as a share of the objective's range


@dataclass
class GP:
    """Expected hypervolume improvement per second of expected cost, over a pool of untried strategies.

    Figures that follow from the configuration (such as the size) are exact; all others are predicted, in the logarithm. A score
    counts as its distance from the best one, so that differences between good scores matter.

    Attributes:
        startup: complete trials before the processes are used; until then strategies are random.
        pool: strategies that are considered for each proposal: all of a small space; else three in four are a moving window of
            a fixed random stock, and the rest are variations of strategies on the front.
        cost_exponent: 1 maximises the gain per second, 0 the gain at any cost.
    """

    seed: int = 0
    startup: int = 3
    pool: int = 256
    cost_exponent: float = 1.0
    _stock: list[Strategy] = field(default_factory=list, init=False, repr=False)
    _settings: dict[str, tuple[int, Settings]] = field(default_factory=dict, init=False, repr=False)
    _feature_cache: BatchCache[tuple[str, ...], Strategy, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=lambda: BatchCache(lambda s: s.overrides, MOST_CACHED), init=False, repr=False
    )
    _latest: _Posterior | None = field(default=None, init=False, repr=False)

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the next strategy.

        Raises:
            Exhausted: every strategy was tried.
        """
        rng = np.random.default_rng([self.seed, history.proposals])
        candidates = self._candidates(history, space, rng)
        if not self.is_ready(history, space):
            order, gains = rng.permutation(len(candidates)), None
        else:
            gains = self.gains(history, space, forecaster, candidates)
            seconds = np.array([forecaster.seconds(s) for s in candidates])
            order = np.argsort(-gains / seconds**self.cost_exponent, kind="stable")
        for place in order:
            if not forecaster.infeasible_reason(candidates[place]):
                if gains is None:
                    return Suggestion(candidates[place], "gp", "drawn at random, to begin with")
                why = f"{gains[place]:.2%} of the hypervolume to be gained in some {seconds[place]:.0f} s"
                return Suggestion(candidates[place], "gp", why, expected_gain=float(gains[place]))
        return Suggestion(candidates[order[0]], "gp", "nothing that can be made here is left")

    def _candidates(self, history: History, space: Space, rng: np.random.Generator) -> list[Strategy]:
        if (size := space.size()) is not None and size <= ENUMERABLE:
            return untried_strategies(history, space, rng, self.pool)
        if not self._stock:
            self._stock = random_strategies(space, np.random.default_rng([self.seed, 0]), STOCK)
        start = history.proposals * self.pool // 8 % len(self._stock)  # most were forecast for the last proposal
        rotated = itertools.chain(self._stock[start:], self._stock[:start])
        window = itertools.islice((s for s in rotated if s.overrides not in history.proposed), 3 * self.pool // 4)
        nearby = untried_strategies(history, space, rng, self.pool // 4, near=1.0)
        return list({s.overrides: s for s in [*nearby, *window]}.values())

    def is_ready(self, history: History, space: Space) -> bool:
        """Returns True if there are enough complete trials of the space to use the processes."""
        needed = max(2, self.startup)
        usable = (t for t in subsampled_trials(history) if t.complete and space.contains(t.strategy))
        return len(list(itertools.islice(usable, needed))) == needed

    def gains(
        self, history: History, space: Space, forecaster: Forecaster, candidates: Sequence[Strategy]
    ) -> np.ndarray:
        """Returns the expected improvement of each [candidates], as a share of the box that could be dominated."""
        with _one_thread():
            return self._gains(history, space, forecaster, candidates)

    def _gains(
        self, history: History, space: Space, forecaster: Forecaster, candidates: Sequence[Strategy]
    ) -> np.ndarray:
        candidate_features = self._features(space, candidates)
        forecast = forecaster.figures(candidates)
        posterior = self._posterior(history)
        means, deviations = np.zeros((2, len(candidates), len(history.objectives)))
        for column, (objective, best) in enumerate(zip(history.objectives, posterior.best_values, strict=True)):
            exact = [figures.get(objective.name) for figures in forecast]
            if all(value is not None for value in exact):
                means[:, column] = np.log(as_cost(objective, np.array(exact, dtype=float), best))
                continue
            if objective.name not in posterior.processes:
                # trials of other spaces have no features here
                in_space = [trial for trial in posterior.trials if space.contains(trial.strategy)]
                trials, values, noise = observations(objective, in_space, history.front)
                x = self._features(space, [t.strategy for t in trials])
                y = np.log(as_cost(objective, values, best))
                posterior.processes[objective.name] = self._process(objective.name, x, y, noise)
            means[:, column], deviations[:, column] = posterior.processes[objective.name].predict(candidate_features)
        improvement = expected_improvement(posterior.open_boxes, means, deviations)
        gains: np.ndarray = improvement * success_probability(posterior.trials, candidates) / posterior.volume
        return gains

    def _posterior(self, history: History) -> _Posterior:
        latest = self._latest
        if latest is None or latest.history is not history or latest.trial_count != len(history.trials):
            self._latest = latest = _Posterior(history)
        return latest

    def _features(self, space: Space, candidates: Sequence[Strategy]) -> Features:
        """Returns the features of the candidates; most of the stock's are cached."""

        def compute(missing: list[Strategy]) -> list[tuple[np.ndarray, np.ndarray]]:
            computed = features(space, missing)
            return list(zip(computed.methods, computed.knobs, strict=True))

        methods, knobs = zip(*self._feature_cache.values(candidates, compute), strict=True)
        return Features(np.array(methods), np.array(knobs))

    def _process(self, name: str, x: Features, y: np.ndarray, noise: np.ndarray) -> GaussianProcess:
        """Returns the posterior; it refits the hyperparameters when the observations have grown by a quarter."""
        fitted_at, settings = self._settings.get(name, (0, Settings()))
        if len(y) >= 1.25 * fitted_at:
            settings = fit_settings(x, y, noise)
            self._settings[name] = (len(y), settings)
        return GaussianProcess(x, y, settings, noise)


class _Posterior:
    """What the finished trials imply, computed once until another trial ends.

    Attributes:
        trials: the trials that count.
        best_values: the best value of each objective, see `best_of`.
        open_boxes: what no trial dominates yet, see `undominated_boxes`.
        volume: of the whole box between the best values and the reference point.
        processes: by objective.
    """

    def __init__(self, history: History) -> None:
        self.history, self.trial_count = history, len(history.trials)
        self.trials = subsampled_trials(history)
        complete = [trial for trial in self.trials if trial.complete]
        self.best_values = [best_of(objective, complete) for objective in history.objectives]
        columns = [
            as_cost(objective, np.array([t.figures[objective.name] for t in complete]), best)
            for objective, best in zip(history.objectives, self.best_values, strict=True)
        ]
        points = np.stack(columns, axis=1)
        worst, best = points.max(0), points.min(0)
        reference = worst + MARGIN * np.maximum(worst - best, 1e-9 * worst)
        self.open_boxes = undominated_boxes(nondominated(points), reference)
        self.volume = float(np.prod(reference - best))
        self.processes: dict[str, GaussianProcess] = {}


def _one_thread() -> contextlib.AbstractContextManager[Any]:
    """Limits BLAS to one thread: for small matrices, threads wait longer than they compute, above all while trials run."""
    return _blas().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]


@functools.cache
def _blas() -> Any:
    import scipy.linalg  # noqa: F401  loads the libraries that are limited
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def best_of(objective: Objective, complete: Sequence[Trial]) -> float:
    """Returns the largest value of an objective."""
    return max((t.figures[objective.name] for t in complete), default=0.0)


def as_cost(objective: Objective, values: np.ndarray, best: float) -> np.ndarray:
    """Returns the objective as a positive cost; a score counts as its distance from the best one plus 1 % of that."""
    values = best + 0.01 * abs(best) - values if objective.maximize else values
    costs: np.ndarray = np.maximum(values, 1e-3 * max(abs(best), 1e-9))
    return costs


def subsampled_trials(history: History) -> Sequence[Trial]:
    """Returns all trials, or of very many those on the front, the newest, and an even choice of the rest."""
    trials, most = history.trials, MOST_OBSERVATIONS
    if len(trials) <= 2 * most:
        return trials
    earlier = trials[:-most]
    chosen = (*history.on_front, *earlier[:: len(earlier) // most], *trials[-most:])
    return sorted({trial.number: trial for trial in chosen}.values(), key=lambda trial: trial.number)


def observations(
    objective: Objective, trials: Sequence[Trial], on_front: Sequence[int]
) -> tuple[list[Trial], np.ndarray, np.ndarray]:
    """Returns the trials with information on an objective, their values, and their noise relative to that of a full score.

    The value of a stopped trial is its estimate from some items, or the mean score of trials with a similar divergence.
    """
    name = objective.name
    kls = {t.number: t.figures[KL] for t in trials if math.isfinite(t.figures.get(KL, math.nan))}
    curve = sorted((kls[t.number], t.figures[name]) for t in trials if t.complete and t.number in kls)
    log_kls = np.log(np.array([kl for kl, _ in curve]) + 1e-4)
    rows: list[tuple[Trial, float, float]] = []
    for trial in trials:
        if name in trial.figures and not trial.failed:
            rows.append((trial, trial.figures[name], ESTIMATED if trial.disturbed(name) else 1.0))
        elif name in trial.estimates:
            rows.append((trial, trial.estimates[name], ESTIMATED))
        elif objective.maximize and trial.number in kls and len(curve) > 3:
            place = int(np.searchsorted(log_kls, np.log(kls[trial.number] + 1e-4)))
            neighbors = curve[min(max(0, place - 1), len(curve) - 3) :][:3]
            rows.append((trial, float(np.mean([value for _, value in neighbors])), GUESSED))
    if len(rows) > MOST_OBSERVATIONS:
        front = set(on_front)
        best = [row for row in rows if row[0].number in front][-MOST_OBSERVATIONS // 3 :]
        dominated = [row for row in rows if row[0].number not in front]
        newest = dominated[-MOST_OBSERVATIONS // 3 :]
        earlier = dominated[: -MOST_OBSERVATIONS // 3]
        rows = best + newest + earlier[:: max(1, 3 * len(earlier) // MOST_OBSERVATIONS)][: MOST_OBSERVATIONS // 3]
    return [row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows])


def success_probability(trials: Sequence[Trial], candidates: Sequence[Strategy]) -> np.ndarray:
    """Returns the probability [candidates] that a strategy does not fail.

    Each method contributes its success rate by Laplace's rule, with one assumed success.
    """
    counts: dict[str, list[int]] = {}  # method -> [trials that did not fail, failed trials]
    for trial in trials:
        for method in trial.strategy.methods:
            counts.setdefault(method, [0, 0])[trial.failed] += 1
    probability = {method: (good + 1) / (good + bad + 1) for method, (good, bad) in counts.items()}
    return np.array([math.prod(probability.get(m, 1.0) for m in s.methods) for s in candidates])
