"""Allocates a sparsity to each layer from statistics of its pruning scores.

All schemes keep the share of zeros over all weights exactly at the target, with each matrix between 0 and `MOST`:

- `global_threshold`: one threshold over all matrices.
- `owl`: less from the blocks with more outliers (Yin et al. 2023, arXiv:2310.05175).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

MOST = 0.99  # a matrix of zeros would block the signal
BINS = 1 << 15


def histogram(score_oi: torch.Tensor) -> torch.Tensor:
    """Counts [BINS] scores >= 0 by the first 16 bits of their single-precision form; the counts are in main memory.

    A bin spans less than a hundredth of its value; with bfloat16 scores it is exactly one value.
    """
    bits = score_oi.float().contiguous().view(torch.int32) >> 16
    return torch.bincount(bits.flatten(), minlength=BINS).cpu()


def outlier_share(scores: Sequence[torch.Tensor], m: float) -> float:
    """Returns the share of a block's scores that are more than `m` times their mean (section 3.2, with eq. 1's |weight| x norm)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return sum(int((score > m * mean).sum()) for score in scores) / count


def owl(outliers: Sequence[float], sizes: Sequence[int], target: float, spread: float) -> list[float]:
    """Returns the sparsity of each block, from `target` - `spread` to `target` + `spread`: the more outliers, the lower.

    `sizes` are the blocks' numbers of weights. Outlier shares are scaled linearly to the whole range, as in the authors' code.
    """
    low, high = min(outliers), max(outliers)
    shift = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    return _solve_level(lambda level: [level - s for s in shift], sizes, target, -1.0, 2.0)


def global_threshold(histograms: Mapping[str, torch.Tensor], target: float) -> dict[str, float]:
    """Returns the sparsity of each matrix when all scores are ranked together; it interpolates within a bin."""
    import numpy as np

    curves = []
    for counts in histograms.values():
        filled = counts.nonzero()[:, 0].numpy()
        below = counts.cumsum(0).double().numpy()[filled] / int(counts.sum())
        curves.append((np.append(filled, filled[-1] + 1), np.insert(below, 0, 0.0)))
    sizes = [int(counts.sum()) for counts in histograms.values()]
    sparsities = _solve_level(
        lambda level: [float(np.interp(level, *c)) for c in curves], sizes, target, 0.0, float(BINS)
    )
    return dict(zip(histograms, sparsities, strict=True))


def _solve_level(
    sparsities: Callable[[float], list[float]], sizes: Sequence[int], target: float, low: float, high: float
) -> list[float]:
    """Returns the sparsities, clipped to [0, MOST], at the level between `low` and `high` where their mean is `target`."""

    def clipped(level: float) -> list[float]:
        return [min(max(s, 0.0), MOST) for s in sparsities(level)]

    def mean(shares: Sequence[float]) -> float:
        return sum(s * size for s, size in zip(shares, sizes, strict=True)) / sum(sizes)

    for _ in range(100):  # bisects to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if mean(clipped(middle)) < target else (low, middle)
    return clipped(high)
