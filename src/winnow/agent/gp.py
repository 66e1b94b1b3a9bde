"""A Gaussian process for each objective, and the strategy with the most hypervolume to gain for the time that it takes.

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

from winnow.agent.improvement import boxes, expected, nondominated
from winnow.agent.surrogate import Features, GaussianProcess, Settings, features, fitted
from winnow.core.types import Objective, Strategy, Trial
from winnow.study.history import History
from winnow.study.objectives import KL
from winnow.study.policy import ENUMERABLE, Forecaster, Suggestion, drawn, fresh
from winnow.study.space import Space

MOST_OBSERVATIONS = 300  # that a process is conditioned on: solving for them is cubic
ESTIMATED, GUESSED = 5.0, 30.0  # the noise of what was scored on some items, and of what only the divergence tells
STOCK = 2048  # strategies of a large space
MOST_KNOWN = 20_000  # strategies whose features are remembered
MARGIN = 0.1  # of the range of an objective, past its worst value: where the hypervolume is counted from


@dataclass
class GP:
    """Expected hypervolume improvement for each second of expected cost, over a pool of strategies that were not tried.

    What is known of a strategy from its configuration (its size) is taken as known; everything else is learned, in the
    logarithm. Scores count as what they miss of the best one, so that differences between good ones are seen.

    Attributes:
        startup: trials that are drawn at random before the processes count.
        pool: strategies that are looked at for each proposal: all of a small space; else three in four of a stock that is drawn
            once, of which each proposal looks a bit further, and the rest like those on the front.
        cost_exponent: 1 asks for the most gain a second, 0 for the most gain whatever it costs.
    """

    seed: int = 0
    startup: int = 3
    pool: int = 256
    cost_exponent: float = 1.0
    _stock: list[Strategy] = field(default_factory=list, init=False, repr=False)
    _settings: dict[str, tuple[int, Settings]] = field(default_factory=dict, init=False, repr=False)
    _known: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)
    _now: _Moment | None = field(default=None, init=False, repr=False)

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        """The next strategy.

        Raises:
            Exhausted: there is none that was not tried.
        """
        rng = np.random.default_rng([self.seed, history.proposals])
        candidates = self._candidates(history, space, rng)
        if not self.is_ready(history, space):
            order, gains = rng.permutation(len(candidates)), None
        else:
            gains = self.gains(history, space, outlook, candidates)
            seconds = np.array([outlook.seconds(s) for s in candidates])
            order = np.argsort(-gains / seconds**self.cost_exponent, kind="stable")
        for place in order:
            if not outlook.infeasible_reason(candidates[place]):
                if gains is None:
                    return Suggestion(candidates[place], "gp", "drawn at random, to begin with")
                why = f"{gains[place]:.2%} of the hypervolume to be gained in some {seconds[place]:.0f} s"
                return Suggestion(candidates[place], "gp", why, expected_gain=float(gains[place]))
        return Suggestion(candidates[order[0]], "gp", "nothing that can be made here is left")

    def _candidates(self, history: History, space: Space, rng: np.random.Generator) -> list[Strategy]:
        if (size := space.size()) is not None and size <= ENUMERABLE:
            return fresh(history, space, rng, self.pool)
        if not self._stock:
            self._stock = drawn(space, np.random.default_rng([self.seed, 0]), STOCK)
        start = history.proposals * self.pool // 8 % len(self._stock)  # most were forecast for the last proposal
        turned = itertools.chain(self._stock[start:], self._stock[:start])
        found = itertools.islice((s for s in turned if s.overrides not in history.seen), 3 * self.pool // 4)
        return list({s.overrides: s for s in [*fresh(history, space, rng, self.pool // 4, near=1.0), *found]}.values())

    def is_ready(self, history: History, space: Space) -> bool:
        """Whether the processes count: there are as many complete trials of the space as `startup` says."""
        needed = max(2, self.startup)
        known = (t for t in considered(history) if t.complete and space.holds(t.strategy))
        return len(list(itertools.islice(known, needed))) == needed

    def gains(self, history: History, space: Space, outlook: Forecaster, candidates: Sequence[Strategy]) -> np.ndarray:
        """The expected improvement of each [candidates], as a share of all that could be dominated."""
        with _one_thread():
            return self._gains(history, space, outlook, candidates)

    def _gains(self, history: History, space: Space, outlook: Forecaster, candidates: Sequence[Strategy]) -> np.ndarray:
        new = self._features(space, candidates)
        forecast = outlook.figures(candidates)
        now = self._at(history)
        means, deviations = np.zeros((2, len(candidates), len(history.objectives)))
        for column, (objective, top) in enumerate(zip(history.objectives, now.tops, strict=True)):
            known = [figures.get(objective.name) for figures in forecast]
            if all(value is not None for value in known):
                means[:, column] = np.log(missing(objective, np.array(known, dtype=float), top))
                continue
            if objective.name not in now.processes:
                told = [trial for trial in now.told if space.holds(trial.strategy)]  # others have no features here
                trials, values, noise = observed(objective, told, history.front)
                x = self._features(space, [t.strategy for t in trials])
                y = np.log(missing(objective, values, top))
                now.processes[objective.name] = self._process(objective.name, x, y, noise)
            means[:, column], deviations[:, column] = now.processes[objective.name].predict(new)
        gain = expected(now.open_boxes, means, deviations)
        found: np.ndarray = gain * likely(now.told, candidates) / now.volume
        return found

    def _at(self, history: History) -> _Moment:
        if self._now is None or self._now.history is not history or self._now.trials != len(history.trials):
            self._now = _Moment(history)
        return self._now

    def _features(self, space: Space, candidates: Sequence[Strategy]) -> Features:
        """Those of the candidates; most of a stock were looked at before."""
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        new = [s for s in candidates if s.overrides not in self._known]
        if new:
            found = features(space, new)
            rows = zip(found.methods, found.knobs, strict=True)
            self._known.update(zip((s.overrides for s in new), rows, strict=True))
        methods, knobs = zip(*(self._known[s.overrides] for s in candidates), strict=True)
        return Features(np.array(methods), np.array(knobs))

    def _process(self, name: str, x: Features, y: np.ndarray, noise: np.ndarray) -> GaussianProcess:
        """The posterior; hyperparameters are fitted anew when the observations have grown by a quarter."""
        fitted_at, settings = self._settings.get(name, (0, Settings()))
        if len(y) >= 1.25 * fitted_at:
            settings = fitted(x, y, noise)
            self._settings[name] = (len(y), settings)
        return GaussianProcess(x, y, settings, noise)


class _Moment:
    """What the trials say until another ends: worked out once, whatever is asked meanwhile.

    Attributes:
        tops: the best value of each objective.
        open_boxes, volume: what no trial dominates yet, as of `winnow.agent.improvement.boxes`; of the whole box.
        processes: by objective.
    """

    def __init__(self, history: History) -> None:
        self.history, self.trials = history, len(history.trials)
        self.told = considered(history)
        complete = [trial for trial in self.told if trial.complete]
        self.tops = [best_of(objective, complete) for objective in history.objectives]
        columns = [
            missing(objective, np.array([t.figures[objective.name] for t in complete]), top)
            for objective, top in zip(history.objectives, self.tops, strict=True)
        ]
        points = np.stack(columns, axis=1)
        worst, best = points.max(0), points.min(0)
        reference = worst + MARGIN * np.maximum(worst - best, 1e-9 * worst)
        self.open_boxes = boxes(nondominated(points), reference)
        self.volume = float(np.prod(reference - best))
        self.processes: dict[str, GaussianProcess] = {}


def _one_thread() -> contextlib.AbstractContextManager[Any]:
    """The matrices are small: threads would wait for one another longer than they compute, most of all beside trials."""
    return _blas().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]


@functools.cache
def _blas() -> Any:
    import scipy.linalg  # noqa: F401  brings the libraries that are to be limited
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def best_of(objective: Objective, complete: Sequence[Trial]) -> float:
    return max((t.figures[objective.name] for t in complete), default=0.0)


def missing(objective: Objective, values: np.ndarray, top: float) -> np.ndarray:
    """The objective as something positive of which less is better; a score counts as what it misses of the best, and 1 % more."""
    values = top + 0.01 * abs(top) - values if objective.maximize else values
    found: np.ndarray = np.maximum(values, 1e-3 * max(abs(top), 1e-9))
    return found


def considered(history: History) -> Sequence[Trial]:
    """All trials; of very many those on the front, the newest, and an even choice of the rest."""
    trials, most = history.trials, MOST_OBSERVATIONS
    if len(trials) <= 2 * most:
        return trials
    earlier = trials[:-most]
    chosen = (*history.on_front, *earlier[:: len(earlier) // most], *trials[-most:])
    return sorted({trial.number: trial for trial in chosen}.values(), key=lambda trial: trial.number)


def observed(
    objective: Objective, trials: Sequence[Trial], on_front: Sequence[int]
) -> tuple[list[Trial], np.ndarray, np.ndarray]:
    """Trials that tell something of an objective, what they tell, and its noise as a multiple of a full score's.

    Of stopped ones that is an estimate from some items, or what others with a divergence like theirs have scored.
    """
    name = objective.name
    kls = {t.number: t.figures[KL] for t in trials if math.isfinite(t.figures.get(KL, math.nan))}
    curve = sorted((kls[t.number], t.figures[name]) for t in trials if t.complete and t.number in kls)
    known = np.log(np.array([kl for kl, _ in curve]) + 1e-4)
    rows: list[tuple[Trial, float, float]] = []
    for trial in trials:
        if name in trial.figures and not trial.failed:
            rows.append((trial, trial.figures[name], ESTIMATED if trial.disturbed(name) else 1.0))
        elif name in trial.estimates:
            rows.append((trial, trial.estimates[name], ESTIMATED))
        elif objective.maximize and trial.number in kls and len(curve) > 3:
            place = int(np.searchsorted(known, np.log(kls[trial.number] + 1e-4)))
            near = curve[min(max(0, place - 1), len(curve) - 3) :][:3]
            rows.append((trial, float(np.mean([value for _, value in near])), GUESSED))
    if len(rows) > MOST_OBSERVATIONS:
        front = set(on_front)
        best = [row for row in rows if row[0].number in front][-MOST_OBSERVATIONS // 3 :]
        others = [row for row in rows if row[0].number not in front]
        newest = others[-MOST_OBSERVATIONS // 3 :]
        earlier = others[: -MOST_OBSERVATIONS // 3]
        rows = best + newest + earlier[:: max(1, 3 * len(earlier) // MOST_OBSERVATIONS)][: MOST_OBSERVATIONS // 3]
    return [row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows])


def likely(trials: Sequence[Trial], candidates: Sequence[Strategy]) -> np.ndarray:
    """The chance that a strategy does not fail, by how its methods have done (Laplace's rule, one success assumed)."""
    done: dict[str, list[int]] = {}
    for trial in trials:
        for method in trial.strategy.methods:
            counts = done.setdefault(method, [0, 0])
            counts[trial.failed] += 1
    chance = {method: (good + 1) / (good + bad + 1) for method, (good, bad) in done.items()}
    return np.array([math.prod(chance.get(m, 1.0) for m in s.methods) for s in candidates])
