"""Expected hypervolume improvement: how much more a candidate may be expected to dominate, in closed form.

The part of the objective space that no point of the front dominates is cut into boxes; a candidate's improvement is the sum of
what it covers of each. Over independent objectives the expectation is a product for each box (Yang, Emmerich, Deutz and Baeck
2019, "Efficient computation of expected hypervolume improvement using box decomposition algorithms", J. Glob. Optim. 75).
Less is better throughout.
"""

from __future__ import annotations

import numpy as np


def boxes(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Disjoint boxes [boxes, 2, D], low and high corners, of what lies below `reference` and is dominated by no point.

    Args:
        front: non-dominated points [points, D].
        reference: [D]; points beyond it in any objective add nothing.

    By slices along the last objective: between two of its values the rest is the same problem in one objective less. The first
    corner of a box is minus infinity where nothing bounds it.
    """
    front = front[(front < reference).all(1)]
    if front.shape[1] == 1:
        high = min(front[:, 0].min(initial=np.inf), reference[0])
        return np.array([[[-np.inf], [high]]])
    cuts = np.unique(front[:, -1])
    lows, highs = np.concatenate([[-np.inf], cuts]), np.concatenate([cuts, reference[-1:]])
    found = []
    for low, high in zip(lows, highs, strict=True):
        below = nondominated(front[front[:, -1] <= low, :-1])
        flat = boxes(below, reference[:-1])
        slab = np.broadcast_to(np.array([[low], [high]]), (len(flat), 2, 1))
        found.append(np.concatenate([flat, slab], axis=2))
    return np.concatenate(found)


def nondominated(points: np.ndarray) -> np.ndarray:
    """Those of the points [points, D] that no other dominates; of equal ones, one."""
    import moocore

    if len(points) < 2:
        return points
    kept: np.ndarray = points[moocore.is_nondominated(points, maximise=False, keep_weakly=False)]
    return kept


def expected(boxes_: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The expected improvement [candidates] of candidates whose objectives are independent and log-normal.

    Args:
        boxes_: from `boxes`, of positive objectives.
        mean, deviation: [candidates, D], of the objectives' logarithms; a deviation of 0 is a known value.
    """
    gain = np.ones((len(mean), len(boxes_)))
    for d in range(mean.shape[1]):
        corners, places = np.unique(boxes_[:, :, d], return_inverse=True)
        below = shortfall(corners[None, :], mean[:, d, None], deviation[:, d, None])  # [candidates, corners]
        low, high = places.reshape(len(boxes_), 2).T
        gain *= below[:, high] - below[:, low]
    total: np.ndarray = gain.sum(1)
    return total


def shortfall(bound: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(0, bound - Y)] of a log-normal Y: the price of a put option (Black and Scholes 1973)."""
    from scipy.special import ndtr

    bound = np.maximum(bound, 1e-300)
    spread = np.maximum(deviation, 1e-9)
    z = (np.log(bound) - mean) / spread
    value = bound * ndtr(z) - np.exp(mean + spread**2 / 2) * ndtr(z - spread)
    positive: np.ndarray = np.maximum(value, 0.0)
    return positive
