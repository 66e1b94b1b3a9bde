"""Racing: a candidate is stopped once the items scored so far show, with confidence, that another is at least as good.

Items are scored in a random order, in which those that tell models apart come early: of the items R that are left, i is the next
one with the probability q_i = c_i / sum_R c, by its *chance* c_i (`winnow.benchmark.order`). After each round the candidate is
compared, item by item, with each *rival*: a trial on the front that is at least as good in every other objective and has been
scored on all items.
The null hypothesis is that the candidate would beat the rival on all items; the evidence against it is an e-process, a bet that
wins when the candidate does worse:

    K_t = prod_{s<=t} (1 - lambda_s (x_s / q_s - m_s)),    m_s = 0 - x_1 - ... - x_{s-1}

where x_s is the difference of the two scores on the s-th item, times the share of the item in the mean, q_s the probability that
it had of coming s-th, and m_s what is left for all others together if the two are equal: x_s / q_s estimates that without bias.
By Ville's inequality K exceeds 1/alpha with a probability of at most alpha under the null, whenever one looks (betting without
replacement: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS-B 86:1, sections 4
and 5; with unequal chances: Shekhar, Xu, Lipton, Liang and Ramdas 2023, "Risk-limiting financial audits via weighted sampling
without replacement", UAI). The bets are a mixture of several sizes, which is an e-process too. So is the mean over the rivals,
under the hypothesis that none of them is as good: the error rate is that of the whole race.

What the rival scored on the items to come is known: no difference can exceed what it left open there. If the candidate would
not catch up were it right on all of them, no bet is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BETS = np.array([0.1, 0.3, 0.6, 0.9])  # shares of the largest bet that cannot go broke
SURE = np.inf
_NONE = 1e-12


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
        weights: share of each item in each score that is an objective [items, scores]; columns sum to 1.
        chances: of each item [items], relative to one another, by which the order was drawn.
        error_rate: of stopping a candidate that none of its rivals matches, over the whole race.
    """

    rivals: Sequence[Rival]
    weights: np.ndarray
    chances: np.ndarray
    error_rate: float = 0.05

    def beaten_by(self, scores: np.ndarray) -> Rival | None:
        """The rival that the candidate will not beat, with confidence; None while that is open.

        Args:
            scores: of the candidate [items so far, scores], in the same order.
        """
        if not self.rivals or not len(scores):
            return None
        found = np.stack([self._evidence(scores, rival) for rival in self.rivals])  # [rivals, items so far]
        if found.mean(0).max() < 1 / self.error_rate:
            return None
        return self.rivals[int(found.max(1).argmax())]

    def _evidence(self, scores: np.ndarray, rival: Rival) -> np.ndarray:
        """The least over the scores: the null says that the candidate is better in one of them."""
        columns = range(scores.shape[1])
        found = [evidence(scores[:, c], rival.scores[:, c], self.weights[:, c], self.chances) for c in columns]
        least: np.ndarray = np.minimum.reduce(found)
        return least

    def estimate(self, scores: np.ndarray, rival: Rival, column: int) -> tuple[float, float, float]:
        """What a score would be on all items, and an interval around it, from the comparison with a rival."""
        theirs, weights = rival.scores[:, column], self.weights[:, column]
        return estimate(scores[:, column], theirs, weights, self.chances, self.error_rate)


def evidence(scores: np.ndarray, rival: np.ndarray, weights: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """The e-process [T] against: the candidate's weighted mean over all items is above the rival's.

    Args:
        scores: of the candidate on the first T items.
        rival: scores of the rival on all N items, of which the first T are the same.
        weights: of all N items; they sum to 1.
        chances: of all N items.
    """
    seen = len(scores)
    differences = weights[:seen] * (scores - rival[:seen])
    sums = np.cumsum(differences)
    open_ = weights * (1 - rival)
    means = np.concatenate([[0.0], -sums[:-1]])  # of what is left, if the two are equal altogether
    left = _sums_to_come(chances)
    room = _largest_to_come(open_ / chances)[:seen] * left[:seen] - means
    x = differences * left[:seen] / chances[:seen]
    possible = room > _NONE
    losses = np.where(possible, (x - means) / np.where(possible, room, 1.0), 0.0)
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(1 - BETS[:, None] * losses, 0.0)).cumsum(1)
    capital = np.exp(np.minimum(logs, 700.0)).mean(0)
    catchable = np.append(_sums_to_come(open_), 0.0)[1 : seen + 1] + sums
    lost = np.logical_or.accumulate(catchable <= 1e-9 / len(weights))  # a tie is no win
    return np.where(lost, SURE, capital)


def estimate(
    scores: np.ndarray,
    rival: np.ndarray,
    weights: np.ndarray,
    chances: np.ndarray,
    error_rate: float = 0.05,
    points: int = 401,
) -> tuple[float, float, float]:
    """What the weighted mean over all N items would be, from the first T, and an interval that holds whenever one stops.

    The estimate weighs each difference from the rival by the inverse of the probability that its item is among the first T
    (Horvitz and Thompson 1952, JASA 47:260). The interval is made of the values that no bet on either side could refute, on a
    grid, and is widened to the next point.

    Args: as of `evidence`.
    """
    seen = len(scores)
    differences = weights[:seen] * (scores - rival[:seen])
    theirs = float((weights * rival).sum())
    middle = theirs + float((differences / included(chances, seen)[:seen]).sum())
    left = _sums_to_come(chances)[:seen]
    gain = _largest_to_come(weights * (1 - rival) / chances)[:seen] * left
    loss = _largest_to_come(weights * rival / chances)[:seen] * left
    x = differences * left / chances[:seen]
    grid = np.linspace(0.0, 1.0, points)
    means = (grid[:, None] - theirs) - (np.cumsum(differences) - differences)  # [points, T] left, were it that
    capital = np.zeros(points)
    for sign, most in ((1.0, loss), (-1.0, gain)):
        room = np.maximum(most + sign * means, _NONE)
        won = sign * (x - means) / room
        for bet in BETS:
            with np.errstate(divide="ignore"):
                logs = np.log(np.maximum(1 + bet * won, 0.0)).sum(1)
            capital += np.exp(np.minimum(logs, 600.0)) / (2 * len(BETS))
    certain = float((weights[:seen] * scores).sum())  # were all others wrong, or right
    kept = grid[(capital < 1 / error_rate) & (grid >= certain) & (grid <= certain + weights[seen:].sum())]
    step = 1 / (points - 1)
    low, high = (kept.min() - step, kept.max() + step) if len(kept) else (middle, middle)
    low, high = max(low, certain), min(high, certain + float(weights[seen:].sum()))
    return float(np.clip(middle, low, high)), float(low), float(high)


def included(chances: np.ndarray, count: int) -> np.ndarray:
    """The probability of each item to be among the first `count`, when the order is drawn by chances.

    Each item comes at a random time with its chance as the rate (`winnow.benchmark.order`); the probability is that of having
    come by the time when so many have, in the mean (Rosen 1997, "On sampling with probability proportional to size").
    """
    if count >= len(chances):
        return np.ones(len(chances))
    low, high = 0.0, 1.0
    while (1 - np.exp(-chances * high)).sum() < count:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-chances * middle)).sum() < count else (low, middle)
    found: np.ndarray = 1 - np.exp(-chances * high)
    return found


def _sums_to_come(values: np.ndarray) -> np.ndarray:
    """Of each place, the sum from there on."""
    found: np.ndarray = values[::-1].cumsum()[::-1]
    return found


def _largest_to_come(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.maximum.accumulate(values[::-1])[::-1]
    return found
