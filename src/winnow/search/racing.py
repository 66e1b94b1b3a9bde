"""Racing: stops a candidate once the items scored so far show, with confidence, that a rival is at least as good.

Items are scored in a random order in which the items that tell models apart tend to come early: of the remaining items R, item i
comes next with probability q_i = c_i / sum_R c, where c_i is its *chance* (`winnow.benchmark.order`). After each round the
candidate is compared, item by item, with each *rival*: a trial on the front that is at least as good in every other objective and
has been scored on all items.
The null hypothesis is that the candidate would beat the rival on all items; the evidence against it is an e-process, a bet that
wins when the candidate does worse:

    K_t = prod_{s<=t} (1 - lambda_s (x_s / q_s - m_s)),    m_s = 0 - x_1 - ... - x_{s-1}

where x_s is the difference of the two scores on the s-th item times the weight of the item in the mean, q_s is the probability
with which the item came s-th, and m_s is the sum of the differences still to come if the two are equal: x_s / q_s is an unbiased
estimate of that sum. By Ville's inequality K exceeds 1/alpha with probability at most alpha under the null, whenever one looks
(betting without replacement: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS-B
86:1, sections 4 and 5; with unequal chances: Shekhar, Xu, Lipton, Liang and Ramdas 2023, "Risk-limiting financial audits via
weighted sampling without replacement", UAI). A mixture of several bet sizes is an e-process too. So is the mean over the rivals
under the hypothesis that none of them is as good: the error rate holds for the whole race.

The scores of the rival on the items to come are known and bound each difference. If the candidate could not catch up even by
answering all of them correctly, no bet is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETS = np.array([0.1, 0.3, 0.6, 0.9])  # shares of the largest bet that cannot lose all capital
CERTAIN = np.inf
_EPSILON = 1e-12


@dataclass(frozen=True)
class Rival:
    """A trial that the candidate would have to beat.

    Attributes:
        scores: its scores on all items [items, scores], in [0, 1], in item order.
    """

    number: int
    scores: np.ndarray


@dataclass(frozen=True)
class Race:
    """A candidate against its rivals.

    Attributes:
        weights: weight of each item in each score that is an objective [items, scores]; columns sum to 1.
        chances: relative chance of each item [items] by which the item order was drawn.
        error_rate: probability, over the whole race, of stopping a candidate that none of its rivals matches.
    """

    rivals: Sequence[Rival]
    weights: np.ndarray
    chances: np.ndarray
    error_rate: float = 0.05

    def beaten_by(self, scores: np.ndarray) -> Rival | None:
        """Returns the rival that the candidate will not beat, with confidence; None while that is open.

        Args:
            scores: scores of the candidate [items so far, scores], in item order.
        """
        if not self.rivals or not len(scores):
            return None
        capital = np.stack([self._evidence(scores, rival) for rival in self.rivals])  # [rivals, items so far]
        if capital.mean(0).max() < 1 / self.error_rate:
            return None
        return self.rivals[int(capital.max(1).argmax())]

    def _evidence(self, scores: np.ndarray, rival: Rival) -> np.ndarray:
        """Returns the least evidence [T] over the scores, because the null says that the candidate is better in one of them."""
        columns = range(scores.shape[1])
        by_score = [evidence(scores[:, c], rival.scores[:, c], self.weights[:, c], self.chances) for c in columns]
        least: np.ndarray = np.minimum.reduce(by_score)
        return least

    def estimate(self, scores: np.ndarray, rival: Rival, column: int) -> tuple[float, float, float]:
        """Estimates a score on all items from the comparison with a rival; returns the estimate and its interval (low, high)."""
        rival_scores, weights = rival.scores[:, column], self.weights[:, column]
        return estimate(scores[:, column], rival_scores, weights, self.chances, self.error_rate)


def evidence(scores: np.ndarray, rival: np.ndarray, weights: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Returns the e-process [T] against the null that the candidate's weighted mean over all items is above the rival's.

    Args:
        scores: scores of the candidate on the first T items.
        rival: scores of the rival on all N items; the first T are the items of `scores`.
        weights: weights of all N items; they sum to 1.
        chances: chances of all N items.
    """
    count = len(scores)
    differences = weights[:count] * (scores - rival[:count])
    sums = np.cumsum(differences)
    open_gain = weights * (1 - rival)
    means = np.concatenate([[0.0], -sums[:-1]])  # sum still to come if the two are equal over all items
    chances_to_come = _sums_to_come(chances)
    room = _largest_to_come(open_gain / chances)[:count] * chances_to_come[:count] - means
    estimates = differences * chances_to_come[:count] / chances[:count]
    possible = room > _EPSILON
    losses = np.where(possible, (estimates - means) / np.where(possible, room, 1.0), 0.0)
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(1 - BETS[:, None] * losses, 0.0)).cumsum(1)
    capital = np.exp(np.minimum(logs, 700.0)).mean(0)
    catchable = np.append(_sums_to_come(open_gain), 0.0)[1 : count + 1] + sums
    # the null says that the candidate wins strictly: a tie counts as lost
    is_lost = np.logical_or.accumulate(catchable <= 1e-9 / len(weights))
    return np.where(is_lost, CERTAIN, capital)


def estimate(
    scores: np.ndarray,
    rival: np.ndarray,
    weights: np.ndarray,
    chances: np.ndarray,
    error_rate: float = 0.05,
    points: int = 401,
) -> tuple[float, float, float]:
    """Estimates the weighted mean over all N items from the first T; returns it with an interval that holds at any stopping time.

    The estimate weighs each difference from the rival by the inverse of the probability that its item is among the first T
    (Horvitz and Thompson 1952, JASA 47:260). The interval consists of the grid values that no bet on either side refutes,
    widened to the next grid point.

    Args: see `evidence`.
    """
    count = len(scores)
    differences = weights[:count] * (scores - rival[:count])
    rival_mean = float((weights * rival).sum())
    middle = rival_mean + float((differences / inclusion_probabilities(chances, count)[:count]).sum())
    chances_to_come = _sums_to_come(chances)[:count]
    gain = _largest_to_come(weights * (1 - rival) / chances)[:count] * chances_to_come
    loss = _largest_to_come(weights * rival / chances)[:count] * chances_to_come
    estimates = differences * chances_to_come / chances[:count]
    grid = np.linspace(0.0, 1.0, points)
    # [points, T] sum still to come for each value of the grid
    means = (grid[:, None] - rival_mean) - (np.cumsum(differences) - differences)
    capital = np.zeros(points)
    for sign, largest in ((1.0, loss), (-1.0, gain)):
        room = np.maximum(largest + sign * means, _EPSILON)
        gains = sign * (estimates - means) / room
        for bet in BETS:
            with np.errstate(divide="ignore"):
                logs = np.log(np.maximum(1 + bet * gains, 0.0)).sum(1)
            capital += np.exp(np.minimum(logs, 600.0)) / (2 * len(BETS))
    certain = float((weights[:count] * scores).sum())  # lower bound: all other items wrong
    not_refuted = grid[(capital < 1 / error_rate) & (grid >= certain) & (grid <= certain + weights[count:].sum())]
    step = 1 / (points - 1)
    low, high = (not_refuted.min() - step, not_refuted.max() + step) if len(not_refuted) else (middle, middle)
    low, high = max(low, certain), min(high, certain + float(weights[count:].sum()))
    return float(np.clip(middle, low, high)), float(low), float(high)


def inclusion_probabilities(chances: np.ndarray, count: int) -> np.ndarray:
    """Returns the probability of each item to be among the first `count`, when the order is drawn by chances.

    Each item comes at a random time with its chance as the rate (`winnow.benchmark.order`). Its probability is that of coming
    before the time by which `count` items are expected (Rosen 1997, "On sampling with probability proportional to size").
    """
    if count >= len(chances):
        return np.ones(len(chances))
    low, high = 0.0, 1.0
    while (1 - np.exp(-chances * high)).sum() < count:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-chances * middle)).sum() < count else (low, middle)
    probabilities: np.ndarray = 1 - np.exp(-chances * high)
    return probabilities


def _sums_to_come(values: np.ndarray) -> np.ndarray:
    """Returns for each index the sum of the values from there on."""
    sums: np.ndarray = values[::-1].cumsum()[::-1]
    return sums


def _largest_to_come(values: np.ndarray) -> np.ndarray:
    """Returns for each index the maximum of the values from there on."""
    largest: np.ndarray = np.maximum.accumulate(values[::-1])[::-1]
    return largest
