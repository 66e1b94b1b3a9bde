"""Percentiles and intervals against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.hardware.statistics import median_interval, percentile

SAMPLES = [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0], list(np.random.default_rng(0).gamma(2.0, size=57))]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("q", [0, 10, 50, 90, 99.5, 100])
def test_percentile_is_numpys(sample: list[float], q: float) -> None:
    assert percentile(sample, q) == pytest.approx(np.percentile(sample, q), rel=1e-12)


def test_percentile_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    with pytest.raises(ValueError, match="q=101"):
        percentile([1.0], 101)


def test_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    sample = SAMPLES[-1]
    low, high = median_interval(sample, resamples=5000)
    theirs = stats.bootstrap((sample,), np.median, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert low == pytest.approx(theirs.low, rel=0.02)
    assert high == pytest.approx(theirs.high, rel=0.02)


def test_interval_holds_the_median_repeats_and_covers() -> None:
    assert median_interval([2.0] * 5) == (2.0, 2.0)
    generator = np.random.default_rng(1)
    samples = generator.exponential(size=(300, 25))
    bounds = [median_interval(list(row), resamples=300) for row in samples]
    assert bounds[0] == median_interval(list(samples[0]), resamples=300)
    covered = np.mean([low <= np.log(2) <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.99
