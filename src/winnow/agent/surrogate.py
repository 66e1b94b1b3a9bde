"""Predicts the figures of untried strategies, and their uncertainty, with a Gaussian process.

Strategies with different methods have different knobs. The kernel compares strategies slot by slot, and compares knobs only where
both use the same method, so that no knob needs to be imputed:

    k_slot(a, b) = rho + (1 - rho) [same method] exp(-|knobs(a) - knobs(b)|^2 / (2 l^2))
    k(a, b) = share mean_slots k_slot(a, b) + (1 - share) prod_slots k_slot(a, b)

The sum learns the effect of each slot independently of the others, the product lets slots interact. The kernel is positive
definite: it consists of sums and products of a constant plus a block-diagonal part. The scale is estimated from the data in closed
form; the other hyperparameters maximise marginal likelihood (Rasmussen and Williams 2006, eq. 2.30) times prior over a small grid.
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
        knobs: [strategies, slots, knobs], in [0, 1]; 0 past the last knob of a method.
    """

    methods: np.ndarray
    knobs: np.ndarray

    def __len__(self) -> int:
        return len(self.methods)

    def __getitem__(self, rows: np.ndarray | slice) -> Features:
        return Features(self.methods[rows], self.knobs[rows])


def features(space: Space, strategies: Sequence[Strategy]) -> Features:
    """Returns strategies as numbers, see `Features`; a conditional knob that is not set gets 0.5."""
    index = {
        method.name: (slot, number, method.dimensions)
        for slot, (_, group) in enumerate(space.slots())
        for number, method in enumerate(group)
    }
    widest = max((len(m.dimensions) for m in space.methods), default=0)
    methods = np.full((len(strategies), len(space.slots())), NO_METHOD)
    knobs = np.zeros((*methods.shape, max(1, widest)))
    for row, strategy in enumerate(strategies):
        for name in strategy.methods:
            slot, number, dimensions = index[name]
            methods[row, slot] = number
            knobs[row, slot, : len(dimensions)] = [position(d, strategy.knobs.get(d.key)) for d in dimensions]
    return Features(methods, knobs)


def position(dimension: Dimension, value: object) -> float:
    """Returns the position of a value between the ends of its knob, from 0 to 1; choices by their order."""
    if value is None:
        return 0.5
    if dimension.choices:
        last = len(dimension.choices) - 1
        return dimension.choices.index(value) / last if last and value in dimension.choices else 0.5
    low, high, number = dimension.low, dimension.high, float(value)  # type: ignore[arg-type]
    if dimension.log:
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Settings:
    """Hyperparameters, see the module; `noise` is the variance of an observation, as a share of the signal's variance."""

    rho: float = 0.5
    length: float = 0.5
    share: float = 0.5
    noise: float = 0.01


GRID = tuple(
    Settings(*values)
    for values in itertools.product((0.1, 0.4, 0.7), (0.25, 0.6, 1.5), (0.2, 0.5, 0.8), (1e-3, 1e-2, 1e-1))
)


def log_prior(settings: Settings) -> float:
    """Returns the log prior of hyperparameters, up to a constant: a normal distribution around `Settings()`.

    It is normal in unbounded units: log odds of shares, logarithms of scales.
    """
    center = Settings()
    steps = (
        _log_odds(settings.rho) - _log_odds(center.rho),
        2 * math.log(settings.length / center.length),
        _log_odds(settings.share) - _log_odds(center.share),
        math.log(settings.noise / center.noise) / 2,
    )
    return -0.5 * sum(step**2 for step in steps)


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def kernel(a: Features, b: Features, settings: Settings) -> np.ndarray:
    """Returns the correlations [len(a), len(b)]."""
    total = np.zeros((len(a), len(b)))
    product = np.ones((len(a), len(b)))
    slots = a.methods.shape[1]
    for slot in range(slots):
        same = a.methods[:, None, slot] == b.methods[None, :, slot]
        distance = _squared_distances(a.knobs[:, slot], b.knobs[:, slot])
        slot_kernel = settings.rho + (1 - settings.rho) * same * np.exp(-distance / (2 * settings.length**2))
        total += slot_kernel / slots
        product *= slot_kernel
    return settings.share * total + (1 - settings.share) * product


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T, 0.0)
    return distances


class GaussianProcess:
    """The posterior, given observations `y` [n] at `x`.

    Args:
        noise: noise of each observation [n], as a multiple of `settings.noise`; None means 1.
    """

    def __init__(self, x: Features, y: np.ndarray, settings: Settings, noise: np.ndarray | None = None) -> None:
        from scipy.linalg import solve_triangular

        self.x, self.settings = x, settings
        self.center = float(np.mean(y))
        noise_variance = settings.noise * (np.ones(len(y)) if noise is None else noise)
        self._factor = np.linalg.cholesky(kernel(x, x, settings) + np.diag(noise_variance + 1e-8))
        white = solve_triangular(self._factor, y - self.center, lower=True)
        self.variance = max(float(white @ white) / len(y), 1e-12)
        self._white = white
        self.log_likelihood = -0.5 * len(y) * math.log(self.variance) - float(np.log(np.diag(self._factor)).sum())

    def predict(self, x: Features) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation [n] of the noiseless value."""
        from scipy.linalg import solve_triangular

        across = kernel(self.x, x, self.settings)  # [observations, n]
        white = solve_triangular(self._factor, across, lower=True)
        relative_variance = np.maximum(1.0 - (white**2).sum(0), 1e-9)
        return self.center + self._white @ white, np.sqrt(self.variance * relative_variance)


def fit_settings(x: Features, y: np.ndarray, noise: np.ndarray | None = None, most: int = 120) -> Settings:
    """Returns the most probable settings of `GRID`, given `most` evenly chosen observations."""
    rows = np.unique(np.linspace(0, len(y) - 1, min(most, len(y))).astype(int))
    subset_noise = None if noise is None else noise[rows]
    return max(GRID, key=lambda s: GaussianProcess(x[rows], y[rows], s, subset_noise).log_likelihood + log_prior(s))
