"""A Gaussian process over strategies: what a strategy that was not tried is expected to score, and how sure that is.

Strategies have parts that others lack, the knobs of methods that are not in them. The kernel compares slot by slot, and two
strategies' knobs only where both use the same method, so no knob is imputed and none is left to chance:

    k_slot(a, b) = rho + (1 - rho) [same method] exp(-|knobs(a) - knobs(b)|^2 / (2 l^2))
    k(a, b) = share mean_slots k_slot(a, b) + (1 - share) prod_slots k_slot(a, b)

The sum lets what one slot does be learned whatever the others hold, the product lets them interact. It is positive definite: a
constant plus a block-diagonal part, their sums and products. The scale is the data's, in closed form; the other
hyperparameters are the likeliest of a small grid, by marginal likelihood (Rasmussen and Williams 2006, eq. 2.30) and prior.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from winnow.core.types import Strategy
from winnow.study.dimension import Dimension
from winnow.study.space import Space

NO_METHOD = -1


@dataclass(frozen=True)
class Features:
    """Strategies as numbers.

    Attributes:
        methods: the method in each slot [strategies, slots], or `NO_METHOD`.
        knobs: [strategies, slots, knobs], in [0, 1]; 0 beyond those that a method has.
    """

    methods: np.ndarray
    knobs: np.ndarray

    def __len__(self) -> int:
        return len(self.methods)

    def __getitem__(self, rows: np.ndarray | slice) -> Features:
        return Features(self.methods[rows], self.knobs[rows])


def features(space: Space, strategies: Sequence[Strategy]) -> Features:
    """See `Features`. A knob that depends on another and is not set stands in the middle."""
    places = {
        method.name: (slot, number, method.dimensions)
        for slot, (_, group) in enumerate(space.slots())
        for number, method in enumerate(group)
    }
    widest = max((len(m.dimensions) for m in space.methods), default=0)
    methods = np.full((len(strategies), len(space.slots())), NO_METHOD)
    knobs = np.zeros((*methods.shape, max(1, widest)))
    for row, strategy in enumerate(strategies):
        for name in strategy.methods:
            slot, number, dimensions = places[name]
            methods[row, slot] = number
            knobs[row, slot, : len(dimensions)] = [position(d, strategy.knobs.get(d.key)) for d in dimensions]
    return Features(methods, knobs)


def position(dimension: Dimension, value: object) -> float:
    """Where a value stands between the ends of its knob, from 0 to 1; choices by their order."""
    if value is None:
        return 0.5
    if dimension.choices:
        last = len(dimension.choices) - 1
        return dimension.choices.index(value) / last if last and value in dimension.choices else 0.5
    low, high, here = dimension.low, dimension.high, float(value)  # type: ignore[arg-type]
    if dimension.log:
        low, high, here = math.log(low), math.log(high), math.log(here)
    return (here - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Settings:
    """Hyperparameters: see the module; `noise` is that of an observation, as a share of the signal's variance."""

    rho: float = 0.5
    length: float = 0.5
    share: float = 0.5
    noise: float = 0.01


GRID = tuple(
    Settings(*values)
    for values in itertools.product((0.1, 0.4, 0.7), (0.25, 0.6, 1.5), (0.2, 0.5, 0.8), (1e-3, 1e-2, 1e-1))
)


def log_prior(settings: Settings) -> float:
    """Of hyperparameters: what few observations cannot tell is taken to be as `Settings()` has it, give or take.

    Normal, in units that have no ends (log odds of shares, logarithms of scales), up to a constant.
    """
    usual = Settings()
    steps = (
        _log_odds(settings.rho) - _log_odds(usual.rho),
        2 * math.log(settings.length / usual.length),
        _log_odds(settings.share) - _log_odds(usual.share),
        math.log(settings.noise / usual.noise) / 2,
    )
    return -0.5 * sum(step**2 for step in steps)


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def kernel(a: Features, b: Features, settings: Settings) -> np.ndarray:
    """The correlations [len(a), len(b)]."""
    total = np.zeros((len(a), len(b)))
    product = np.ones((len(a), len(b)))
    slots = a.methods.shape[1]
    for slot in range(slots):
        same = a.methods[:, None, slot] == b.methods[None, :, slot]
        distance = _squared_distances(a.knobs[:, slot], b.knobs[:, slot])
        one = settings.rho + (1 - settings.rho) * same * np.exp(-distance / (2 * settings.length**2))
        total += one / slots
        product *= one
    return settings.share * total + (1 - settings.share) * product


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T, 0.0)
    return found


class GaussianProcess:
    """The posterior, given observations `y` [n] at `x`.

    Args:
        noise: of each observation, as a multiple of `settings.noise`; 1 where None.
    """

    def __init__(self, x: Features, y: np.ndarray, settings: Settings, noise: np.ndarray | None = None) -> None:
        from scipy.linalg import solve_triangular

        self.x, self.settings = x, settings
        self.center = float(np.mean(y))
        noisy = settings.noise * (np.ones(len(y)) if noise is None else noise)
        self._factor = np.linalg.cholesky(kernel(x, x, settings) + np.diag(noisy + 1e-8))
        white = solve_triangular(self._factor, y - self.center, lower=True)
        self.variance = max(float(white @ white) / len(y), 1e-12)
        self._white = white
        self.log_likelihood = -0.5 * len(y) * math.log(self.variance) - float(np.log(np.diag(self._factor)).sum())

    def predict(self, x: Features) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [n] of the noiseless value."""
        from scipy.linalg import solve_triangular

        across = kernel(self.x, x, self.settings)  # [observations, n]
        white = solve_triangular(self._factor, across, lower=True)
        left = np.maximum(1.0 - (white**2).sum(0), 1e-9)
        return self.center + self._white @ white, np.sqrt(self.variance * left)


def fitted(x: Features, y: np.ndarray, noise: np.ndarray | None = None, most: int = 120) -> Settings:
    """The likeliest settings of `GRID`, given the observations; by `most` of them, evenly chosen."""
    rows = np.unique(np.linspace(0, len(y) - 1, min(most, len(y))).astype(int))
    part = None if noise is None else noise[rows]
    return max(GRID, key=lambda s: GaussianProcess(x[rows], y[rows], s, part).log_likelihood + log_prior(s))
