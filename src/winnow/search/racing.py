"""Racing: a candidate is stopped once the items scored so far show, with confidence, that another is at least as good.

Items are scored in one fixed random order. After each round the candidate is compared, item by item, with each *rival*: a trial on
the front that is at least as good in every other objective and has been scored on all items. The null hypothesis is that the
candidate would beat the rival on all items; the evidence against it is an e-process, a bet that wins when the candidate does worse:

    K_t = prod_{s<=t} (1 - lambda_s (x_s - m_s)),    m_s = (0 - x_1 - ... - x_{s-1}) / (N - s + 1)

where x_s is the difference of the two scores on the s-th of N items, weighted as the benchmark's mean weighs it, and m_s the mean
that is left for the rest if the two are equal altogether: items are drawn without replacement, so the bet gets surer as they
run out. By Ville's inequality K exceeds 1/alpha with a probability of at most alpha under the null, whenever one looks
(Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS-B 86:1, sections 4 and 5).
The bets are a mixture of several sizes, which is an e-process too. So is the mean over the rivals, under the hypothesis that
none of them is as good: the error rate is that of the whole race.

What the rival scored on the items to come is known. If the candidate would not catch up were it right on all of them, no bet is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETS = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.95])  # shares of the largest bet that cannot go broke
SURE = np.inf


@dataclass(frozen=True)
class Rival:
    """A trial that the candidate would have to beat.

    Attributes:
        scores: on all items [items, scores], in [0, 1], in the order in which they are put.
    """

    number: int
    scores: np.ndarray


@dataclass(frozen=True)
class Race:
    """A candidate against its rivals.

    Attributes:
        weights: of each item in each score that is an objective [items, scores]; columns sum to 1.
        error_rate: of stopping a candidate that none of its rivals matches, over the whole race.
    """

    rivals: Sequence[Rival]
    weights: np.ndarray
    error_rate: float = 0.05

    def beaten_by(self, scores: np.ndarray) -> Rival | None:
        """The rival that the candidate will not beat, with confidence; None while that is open.

        Args:
            scores: of the candidate [items so far, scores], in the same order.
        """
        if not self.rivals or not len(scores):
            return None
        evidence = np.stack([self._evidence(scores, rival) for rival in self.rivals])  # [rivals, items so far]
        if evidence.mean(0).max() < 1 / self.error_rate:
            return None
        return self.rivals[int(evidence.max(1).argmax())]

    def _evidence(self, scores: np.ndarray, rival: Rival) -> np.ndarray:
        """The least over the scores: the null says that the candidate is better in one of them."""
        columns = range(scores.shape[1])
        found = [evidence(scores[:, c], rival.scores[:, c], self.weights[:, c]) for c in columns]
        least: np.ndarray = np.minimum.reduce(found)
        return least


def evidence(scores: np.ndarray, rival: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The e-process [T] against: the candidate's weighted mean over all items is above the rival's.

    Args:
        scores: of the candidate on the first T items.
        rival: scores of the rival on all N items, of which the first T are the same.
        weights: of all N items; they sum to 1.
    """
    total, seen = len(rival), len(scores)
    differences = total * weights[:seen] * (scores - rival[:seen])
    sums = np.concatenate([[0.0], np.cumsum(differences)])
    left = total - np.arange(seen)
    means = -sums[:-1] / left  # of what is left, if the two are equal altogether
    most = total * weights * (1 - rival)
    highest = np.maximum.accumulate(most[::-1])[::-1][:seen]  # of any difference to come
    room = highest - means
    possible = room > 1e-12
    bets = BETS[:, None] / np.where(possible, room, 1.0)
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(1 - bets * (differences - means), 0.0)).cumsum(1)
    capital = np.exp(np.minimum(logs, 700.0)).mean(0)
    to_come = most[::-1].cumsum()[::-1]
    catchable = np.append(to_come, 0.0)[1 : seen + 1] + sums[1:]
    lost = np.logical_or.accumulate(catchable <= 1e-9)  # a tie is no win
    return np.where(lost, SURE, capital)


def interval(
    scores: np.ndarray, weights: np.ndarray, error_rate: float = 0.05, points: int = 401
) -> tuple[float, float, float]:
    """The estimate of a weighted mean over N items from the first T of them, and an interval that holds whenever one stops.

    Args:
        scores: in [0, 1], of T items.
        weights: of all N items, which sum to 1.

    The values that no bet on either side could refute, on a grid: what they say is widened to the next point.
    """
    total, seen = len(weights), len(scores)
    scale = total * weights
    estimate = float((weights[:seen] * scores).sum() / weights[:seen].sum())
    x = scale[:seen] * scores
    highest, left = scale.max(), total - np.arange(seen)
    before = np.concatenate([[0.0], np.cumsum(x)[:-1]])
    grid = np.linspace(0.0, 1.0, points)
    means = (total * grid[:, None] - before) / left  # [points, T] of what is left, were the whole mean that
    impossible = (means < -1e-9).any(1) | (means > highest + 1e-9).any(1)
    capital = np.zeros(points)
    for sign in (1.0, -1.0):
        room = np.maximum(means if sign > 0 else highest - means, 1e-9)
        for bet in BETS:
            with np.errstate(divide="ignore"):
                logs = np.log(np.maximum(1 + sign * bet / room * (x - means), 0.0)).sum(1)
            capital += np.exp(np.minimum(logs, 600.0)) / (2 * len(BETS))
    kept = grid[(capital < 1 / error_rate) & ~impossible]
    step = 1 / (points - 1)
    low, high = (kept.min() - step, kept.max() + step) if len(kept) else (estimate, estimate)
    return estimate, float(max(0.0, min(low, estimate))), float(min(1.0, max(high, estimate)))
