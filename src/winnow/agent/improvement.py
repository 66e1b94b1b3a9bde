"""Computes the expected hypervolume improvement of candidates, in closed form.

The part of the objective space that no point of the front dominates is divided into boxes; a candidate's improvement is the sum
of its shares of the boxes. For independent objectives the expectation is a product in each box (Yang, Emmerich, Deutz and Baeck
2019, "Efficient computation of expected hypervolume improvement using box decomposition algorithms", J. Glob. Optim. 75).
Less is better throughout.
"""

from __future__ import annotations

import numpy as np


def undominated_boxes(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns disjoint boxes [boxes, 2, D], low and high corners, that cover what lies below `reference` and no point dominates.

    Args:
        front: non-dominated points [points, D].
        reference: reference point [D]; points beyond it in any objective add nothing.

    The recursion slices along the last objective: between two of its values the problem has one objective less. The low corner
    of a box is minus infinity where nothing bounds it.
    """
    front = front[(front < reference).all(1)]
    if front.shape[1] == 1:
        high = min(front[:, 0].min(initial=np.inf), reference[0])
        return np.array([[[-np.inf], [high]]])
    cuts = np.unique(front[:, -1])
    lows, highs = np.concatenate([[-np.inf], cuts]), np.concatenate([cuts, reference[-1:]])
    slabs = []
    for low, high in zip(lows, highs, strict=True):
        below = nondominated(front[front[:, -1] <= low, :-1])
        flat = undominated_boxes(below, reference[:-1])
        interval = np.broadcast_to(np.array([[low], [high]]), (len(flat), 2, 1))
        slabs.append(np.concatenate([flat, interval], axis=2))
    return np.concatenate(slabs)


def nondominated(points: np.ndarray) -> np.ndarray:
    """Returns the points [points, D] that no other dominates, and one of equal points."""
    import moocore

    if len(points) < 2:
        return points
    front: np.ndarray = points[moocore.is_nondominated(points, maximise=False, keep_weakly=False)]
    return front


def expected_improvement(boxes: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Returns the expected improvement [candidates] of candidates whose objectives are independent and log-normal.

    Args:
        boxes: the result of `undominated_boxes` for positive objectives.
        mean, deviation: of the objectives' logarithms [candidates, D]; a deviation of 0 means an exact value.
    """
    gain = np.ones((len(mean), len(boxes)))
    for d in range(mean.shape[1]):
        corners, places = np.unique(boxes[:, :, d], return_inverse=True)
        below = shortfall(corners[None, :], mean[:, d, None], deviation[:, d, None])  # [candidates, corners]
        low, high = places.reshape(len(boxes), 2).T
        gain *= below[:, high] - below[:, low]
    total: np.ndarray = gain.sum(1)
    return total


def shortfall(bound: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Returns E[max(0, bound - Y)] of a log-normal Y, the price of a put option (Black and Scholes 1973)."""
    from scipy.special import ndtr

    bound = np.maximum(bound, 1e-300)
    spread = np.maximum(deviation, 1e-9)
    z = (np.log(bound) - mean) / spread
    value = bound * ndtr(z) - np.exp(mean + spread**2 / 2) * ndtr(z - spread)
    positive: np.ndarray = np.maximum(value, 0.0)
    return positive
