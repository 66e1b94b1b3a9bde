"""Races: they stop what is beaten, seldom what is not, and know what is certain."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.search.racing import Race, Rival, evidence, interval

ITEMS = 400
EVEN = np.full(ITEMS, 1 / ITEMS)


def outcomes(rng: np.random.Generator, accuracy: float) -> np.ndarray:
    return (rng.random(ITEMS) < accuracy).astype(float)


def reference_evidence(scores: np.ndarray, rival: np.ndarray, weights: np.ndarray) -> list[float]:
    """The module's formula, item by item and bet by bet."""
    from winnow.search.racing import BETS

    total, found = len(rival), []
    capitals = [1.0] * len(BETS)
    spent, lost = 0.0, False
    for t, score in enumerate(scores):
        x = total * weights[t] * (score - rival[t])
        mean = -spent / (total - t)
        highest = max(total * weights[s] * (1 - rival[s]) for s in range(t, total))
        if highest - mean > 1e-12:
            capitals = [
                c * max(0.0, 1 - bet / (highest - mean) * (x - mean)) for c, bet in zip(capitals, BETS, strict=True)
            ]
        spent += x
        to_come = sum(total * weights[s] * (1 - rival[s]) for s in range(t + 1, total))
        lost = lost or spent + to_come <= 1e-9
        found.append(np.inf if lost else sum(capitals) / len(capitals))
    return found


@pytest.mark.parametrize("worse", [0.0, 0.1, 0.4])
def test_the_evidence_is_that_of_the_formula(worse: float) -> None:
    rng = np.random.default_rng(1)
    rival, mine = outcomes(rng, 0.9)[:60], outcomes(rng, 0.9 - worse)[:60]
    weights = rng.random(60)
    weights /= weights.sum()
    assert evidence(mine[:40], rival, weights) == pytest.approx(reference_evidence(mine[:40], rival, weights), rel=1e-9)


def test_a_candidate_that_would_join_the_front_is_seldom_stopped() -> None:
    """Two rivals that are all but as good as it, looked at after every item: what tempts most."""
    rng, wrong, races = np.random.default_rng(2), 0, 300
    for _ in range(races):
        mine = outcomes(rng, 0.7)
        rivals = []
        for number in range(2):
            theirs = mine.copy()
            flipped = rng.permutation(ITEMS)[:80]
            theirs[flipped] = 1 - theirs[flipped]
            better = int(theirs.sum() - mine.sum()) + 1  # one item worse than the candidate
            right = rng.permutation(np.flatnonzero(theirs == 1))[: max(0, better)]
            theirs[right] = 0
            rivals.append(Rival(number, theirs[:, None]))
        order = rng.permutation(ITEMS)
        race = Race([Rival(r.number, r.scores[order]) for r in rivals], EVEN[:, None], 0.05)
        wrong += race.beaten_by(mine[order][: ITEMS - 1, None]) is not None
    assert wrong / races <= 0.05


def test_a_much_worse_candidate_is_stopped_early_by_the_one_that_beats_it() -> None:
    rng = np.random.default_rng(3)
    weak, strong = outcomes(rng, 0.4), outcomes(rng, 0.9)
    race = Race([Rival(7, weak[:, None]), Rival(8, strong[:, None])], EVEN[:, None])
    mine = outcomes(rng, 0.5)
    stopped = next(n for n in range(1, ITEMS) if race.beaten_by(mine[:n, None]) is not None)
    beaten_by = race.beaten_by(mine[:stopped, None])
    assert stopped < ITEMS // 8 and beaten_by is not None and beaten_by.number == 8


def test_what_cannot_catch_up_is_stopped_for_certain() -> None:
    rival = np.ones(ITEMS)
    mine = np.ones(ITEMS)
    mine[0] = 0.0
    assert Race([Rival(1, rival[:, None])], EVEN[:, None], 1e-9).beaten_by(mine[:1, None]) is not None


def test_an_equal_one_goes_on_as_long_as_it_could_win() -> None:
    mine = outcomes(np.random.default_rng(4), 0.8)
    race = Race([Rival(1, mine[:, None])], EVEN[:, None])
    last = int(np.flatnonzero(mine == 0)[-1])  # the last item that the rival has wrong
    assert all(race.beaten_by(mine[:n, None]) is None for n in range(0, last + 1, 3))
    assert race.beaten_by(mine[: last + 1, None]) is not None


def test_with_two_scores_a_candidate_must_lose_in_both() -> None:
    rng = np.random.default_rng(5)
    strong = outcomes(rng, 0.95)
    mine = np.stack([outcomes(rng, 0.4), np.ones(ITEMS)], axis=1)
    rival = Rival(1, np.stack([strong, strong], axis=1))
    race = Race([rival], np.stack([EVEN, EVEN], axis=1))
    assert race.beaten_by(mine[:300]) is None
    assert race.beaten_by(np.stack([mine[:300, 0], mine[:300, 0]], axis=1)) is rival


def test_without_rivals_nothing_is_stopped() -> None:
    assert Race([], EVEN[:, None]).beaten_by(np.zeros((200, 1))) is None


def test_the_interval_holds_the_mean_and_narrows() -> None:
    rng, missed = np.random.default_rng(6), 0
    weights = np.concatenate([np.full(ITEMS // 2, 1.5), np.full(ITEMS // 2, 0.5)]) / ITEMS
    for _ in range(60):
        whole = outcomes(rng, 0.8)
        order = rng.permutation(ITEMS)
        mine, shares = whole[order], weights[order]
        truth = float((mine * shares).sum())
        early, late = interval(mine[:40], shares), interval(mine[:300], shares)
        missed += not early[1] <= truth <= early[2]
        assert late[2] - late[1] < early[2] - early[1] and early[1] <= early[0] <= early[2]
    assert missed <= 3
