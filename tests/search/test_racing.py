"""Races: they stop what is beaten, seldom what is not, and know what is certain."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.search.racing import BETS, Race, Rival, evidence, inclusion_probabilities

ITEMS = 400
EVEN = np.full(ITEMS, 1 / ITEMS)
ONES = np.ones(ITEMS)


def outcomes(rng: np.random.Generator, accuracy: float) -> np.ndarray:
    return (rng.random(ITEMS) < accuracy).astype(float)


def put(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """An order drawn by chances, one item after the other."""
    left, found = list(range(len(chances))), []
    while left:
        shares = chances[left] / chances[left].sum()
        found.append(left.pop(int(rng.choice(len(left), p=shares))))
    return np.array(found)


def reference_evidence(scores: np.ndarray, rival: np.ndarray, weights: np.ndarray, chances: np.ndarray) -> list[float]:
    """The module's formula, item by item and bet by bet."""
    found = []
    capitals = [1.0] * len(BETS)
    spent, lost = 0.0, False
    for t, score in enumerate(scores):
        x = weights[t] * (score - rival[t])
        left = range(t, len(rival))
        total = sum(chances[s] for s in left)
        highest = max(weights[s] * (1 - rival[s]) / (chances[s] / total) for s in left)
        room = highest + spent
        if room > 1e-12:
            worth = x / (chances[t] / total) + spent
            capitals = [c * max(0.0, 1 - bet / room * worth) for c, bet in zip(capitals, BETS, strict=True)]
        spent += x
        to_come = sum(weights[s] * (1 - rival[s]) for s in range(t + 1, len(rival)))
        lost = lost or spent + to_come <= 1e-11
        found.append(np.inf if lost else sum(capitals) / len(capitals))
    return found


@pytest.mark.parametrize("worse", [0.0, 0.1, 0.4])
def test_the_evidence_is_that_of_the_formula(worse: float) -> None:
    rng = np.random.default_rng(1)
    rival, mine = outcomes(rng, 0.9)[:60], outcomes(rng, 0.9 - worse)[:60]
    weights, chances = rng.random(60), 0.1 + rng.random(60)
    weights /= weights.sum()
    wanted = reference_evidence(mine[:40], rival, weights, chances)
    assert evidence(mine[:40], rival, weights, chances) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("informed", [False, True])
def test_a_candidate_that_would_join_the_front_is_seldom_stopped(informed: bool) -> None:
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
        missed = np.mean([1 - r.scores[:, 0] for r in rivals], 0)
        chances = 0.02 + missed if informed else np.ones(ITEMS)
        order = put(rng, chances)
        race = Race([Rival(r.number, r.scores[order]) for r in rivals], EVEN[:, None], chances[order], 0.05)
        wrong += race.beaten_by(mine[order][: ITEMS - 1, None]) is not None
    assert wrong / races <= 0.05


def test_a_much_worse_candidate_is_stopped_early_by_the_one_that_beats_it() -> None:
    rng = np.random.default_rng(3)
    weak, strong = outcomes(rng, 0.4), outcomes(rng, 0.9)
    race = Race([Rival(7, weak[:, None]), Rival(8, strong[:, None])], EVEN[:, None], ONES)
    mine = outcomes(rng, 0.5)
    stopped = next(n for n in range(1, ITEMS) if race.beaten_by(mine[:n, None]) is not None)
    beaten_by = race.beaten_by(mine[:stopped, None])
    assert stopped < ITEMS // 8 and beaten_by is not None and beaten_by.number == 8


def test_what_cannot_catch_up_is_stopped_for_certain() -> None:
    rival = np.ones(ITEMS)
    mine = np.ones(ITEMS)
    mine[0] = 0.0
    assert Race([Rival(1, rival[:, None])], EVEN[:, None], ONES, 1e-9).beaten_by(mine[:1, None]) is not None


def test_an_equal_one_goes_on_as_long_as_it_could_win() -> None:
    mine = outcomes(np.random.default_rng(4), 0.8)
    race = Race([Rival(1, mine[:, None])], EVEN[:, None], ONES)
    last = int(np.flatnonzero(mine == 0)[-1])  # the last item that the rival has wrong
    assert all(race.beaten_by(mine[:n, None]) is None for n in range(0, last + 1, 3))
    assert race.beaten_by(mine[: last + 1, None]) is not None


def test_with_two_scores_a_candidate_must_lose_in_both() -> None:
    rng = np.random.default_rng(5)
    strong = outcomes(rng, 0.95)
    mine = np.stack([outcomes(rng, 0.4), np.ones(ITEMS)], axis=1)
    rival = Rival(1, np.stack([strong, strong], axis=1))
    race = Race([rival], np.stack([EVEN, EVEN], axis=1), ONES)
    assert race.beaten_by(mine[:300]) is None
    assert race.beaten_by(np.stack([mine[:300, 0], mine[:300, 0]], axis=1)) is rival


def test_without_rivals_nothing_is_stopped() -> None:
    assert Race([], EVEN[:, None], ONES).beaten_by(np.zeros((200, 1))) is None


def test_items_that_tell_models_apart_end_a_race_sooner() -> None:
    """Two hard items in ten; the rival has a tenth of these wrong, the candidate three tenths."""
    rng, ends = np.random.default_rng(7), {}
    hard = np.arange(ITEMS) < ITEMS // 5
    for name, chances in (("even", ONES), ("informed", np.where(hard, 1.0, 0.01))):
        found = []
        for _ in range(20):
            rival = np.where(hard, rng.random(ITEMS) < 0.9, 1.0).astype(float)
            mine = np.where(hard, rng.random(ITEMS) < 0.7, 1.0).astype(float)
            order = put(rng, chances)
            race = Race([Rival(1, rival[order][:, None])], EVEN[:, None], chances[order])
            stopped = (n for n in range(10, ITEMS, 10) if race.beaten_by(mine[order][:n, None]) is not None)
            found.append(next(stopped, ITEMS))
        ends[name] = np.mean(found)
    assert ends["informed"] < ends["even"] / 2


@pytest.mark.parametrize("informed", [False, True])
def test_the_interval_holds_the_mean_and_narrows(informed: bool) -> None:
    rng, missed, errors = np.random.default_rng(6), 0, []
    weights = np.concatenate([np.full(ITEMS // 2, 1.5), np.full(ITEMS // 2, 0.5)]) / ITEMS
    for _ in range(60):
        whole, rival = outcomes(rng, 0.8), outcomes(rng, 0.9)
        chances = 0.1 + (1 - rival) if informed else ONES
        order = put(rng, chances)
        race = Race([Rival(1, rival[order][:, None])], weights[order][:, None], chances[order])
        mine = whole[order][:, None]
        truth = float((whole * weights).sum())
        early, late = (race.estimate(mine[:count], race.rivals[0], 0) for count in (40, 300))
        missed += not early[1] <= truth <= early[2]
        errors.append(late[0] - truth)
        assert late[2] - late[1] < early[2] - early[1] and early[1] <= early[0] <= early[2]
    assert missed <= 3
    assert abs(np.mean(errors)) < 3 * np.std(errors) / len(errors) ** 0.5 + 0.002


def test_all_items_leave_nothing_to_estimate() -> None:
    rng = np.random.default_rng(8)
    mine, rival = outcomes(rng, 0.7), outcomes(rng, 0.8)
    race = Race([Rival(1, rival[:, None])], EVEN[:, None], 0.1 + rng.random(ITEMS))
    assert race.estimate(mine[:, None], race.rivals[0], 0) == pytest.approx((mine.mean(),) * 3)


def test_chances_of_being_among_the_first_are_those_of_the_draw() -> None:
    rng = np.random.default_rng(9)
    chances = np.array([1.0] * 5 + [0.2] * 15)
    drawn = np.mean([np.isin(np.arange(20), put(rng, chances)[:6]) for _ in range(4000)], axis=0)
    found = inclusion_probabilities(chances, 6)
    assert found.sum() == pytest.approx(6)
    assert found == pytest.approx(drawn, abs=0.03)
