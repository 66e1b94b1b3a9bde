"""How much of each layer is pruned, when not the same of every one: from statistics of the scores that pruning ranks by.

All schemes hold the share of zeros over all weights at the target exactly, with each matrix between 0 and `MOST`:

- `global_threshold`: one threshold over all matrices.
- `owl`: less from the blocks with more outliers (Yin et al. 2023, arXiv:2310.05175).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

MOST = 0.99  # a matrix without any weight left would cut the model in two
BINS = 1 << 15


def histogram(score_oi: torch.Tensor) -> torch.Tensor:
    """Counts [BINS], in main memory, of scores >= 0 by the first 16 bits of their single-precision form.

    A bin spans less than a hundredth of its value, and is one value exactly where scores are bfloat16.
    """
    bits = score_oi.float().contiguous().view(torch.int32) >> 16
    return torch.bincount(bits.flatten(), minlength=BINS).cpu()


def outlier_share(scores: Sequence[torch.Tensor], m: float) -> float:
    """The share of a block's scores that are more than `m` times their mean (section 3.2, with eq. 1's |weight| x norm)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return sum(int((score > m * mean).sum()) for score in scores) / count


def owl(outliers: Sequence[float], sizes: Sequence[int], target: float, spread: float) -> list[float]:
    """The sparsity of each block, from `target` - `spread` to `target` + `spread`: the more outliers, the lower.

    Blocks of `sizes` weights; the shares of outliers are scaled linearly to the whole range, as in the authors' code.
    """
    low, high = min(outliers), max(outliers)
    shift = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    return _level(lambda level: [level - s for s in shift], sizes, target, -1.0, 2.0)


def global_threshold(histograms: Mapping[str, torch.Tensor], target: float) -> dict[str, float]:
    """The sparsity of each matrix when the scores of all matrices are ranked together; within a bin it is interpolated."""
    import numpy as np

    curves = []
    for counts in histograms.values():
        filled = counts.nonzero()[:, 0].numpy()
        below = counts.cumsum(0).double().numpy()[filled] / int(counts.sum())
        curves.append((np.append(filled, filled[-1] + 1), np.insert(below, 0, 0.0)))
    sizes = [int(counts.sum()) for counts in histograms.values()]
    found = _level(lambda level: [float(np.interp(level, *curve)) for curve in curves], sizes, target, 0.0, float(BINS))
    return dict(zip(histograms, found, strict=True))


def _level(
    sparsities: Callable[[float], list[float]], sizes: Sequence[int], target: float, low: float, high: float
) -> list[float]:
    """The sparsities, clipped to [0, MOST], at the level between `low` and `high` where their mean is `target`."""

    def at(level: float) -> list[float]:
        return [min(max(s, 0.0), MOST) for s in sparsities(level)]

    def mean(found: Sequence[float]) -> float:
        return sum(s * size for s, size in zip(found, sizes, strict=True)) / sum(sizes)

    for _ in range(100):  # bisection, down to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if mean(at(middle)) < target else (low, middle)
    return at(high)
