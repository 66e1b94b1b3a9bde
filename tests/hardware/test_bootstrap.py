"""Percentiles and intervals against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.hardware.bootstrap import median_interval, percentile, ratio_interval

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


def test_the_ratios_interval_is_that_of_scipys_paired_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    moment = generator.gamma(4.0, size=40)  # what slows both of a pair
    ours, theirs = moment * generator.normal(2, 0.1, 40), moment * generator.normal(1, 0.05, 40)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    low, high = ratio_interval(list(ours), list(theirs), resamples=5000)
    found = stats.bootstrap((ours, theirs), ratio, paired=True, n_resamples=5000, method="percentile", rng=1)
    assert low == pytest.approx(found.confidence_interval.low, rel=0.02)
    assert high == pytest.approx(found.confidence_interval.high, rel=0.02)
    assert low < 2 < high


def test_ratios_need_pairs() -> None:
    assert ratio_interval([2.0, 8.0], [1.0, 4.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="2 and 1 values make no pairs"):
        ratio_interval([1.0, 2.0], [1.0])


def test_interval_holds_the_median_repeats_and_covers() -> None:
    assert median_interval([2.0] * 5) == (2.0, 2.0)
    generator = np.random.default_rng(1)
    samples = generator.exponential(size=(300, 25))
    bounds = [median_interval(list(row), resamples=300) for row in samples]
    assert bounds[0] == median_interval(list(samples[0]), resamples=300)
    covered = np.mean([low <= np.log(2) <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.99
