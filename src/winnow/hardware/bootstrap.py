"""Computes percentiles and bootstrap intervals of small samples of timings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def percentile(values: Sequence[float], q: float) -> float:
    """Returns the q-th percentile (0 to 100), linear between order statistics: definition 7 of Hyndman and Fan (1996).

    Raises:
        ValueError: no values, or q out of range.
    """
    if not values:
        raise ValueError("the percentile of nothing")
    if not 0 <= q <= 100:
        raise ValueError(f"q={q} is not between 0 and 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Returns the lower and upper bound of the median by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    `resamples` samples of the same size are drawn with replacement; the bounds are percentiles of their medians. Timings of one
    process are not quite independent, so the true coverage is somewhat below `confidence`.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("the interval of nothing")
    sample = np.asarray(values, dtype=np.float64)
    medians = np.median(sample[_resample_indices(len(sample), resamples, seed)], axis=1)  # [resamples]
    return _central_interval(medians, confidence)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the lower and upper bound of the ratio of two medians; see `median_interval`.

    Pairs are resampled, so that a slowdown of both values of a pair does not widen the interval.

    Raises:
        ValueError: no values, or different numbers of them.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} values make no pairs")
    indices = _resample_indices(len(numerators), resamples, seed)
    above, below = (
        np.median(np.asarray(sample, dtype=np.float64)[indices], axis=1) for sample in (numerators, denominators)
    )
    return _central_interval(above / below, confidence)


def _resample_indices(count: int, resamples: int, seed: int) -> np.ndarray:
    """Returns indices [resamples, count], drawn with replacement."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _central_interval(statistics: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
