"""Killed anywhere and started again, a search loses and repeats no finished trial."""

from __future__ import annotations

import random
from pathlib import Path

from tests.search import kills, small_search
from winnow.study.opening import open_study

KILLS = 20


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    rng, counts = random.Random(20), kills.Counts()
    folder = tmp_path
    for number in range(KILLS):
        folder = tmp_path / str(number)
        kills.kill_often(folder, KILLS, rng, counts, seconds=0.2)
        kills.end(folder, counts, seconds=0.2)
        if counts.kills == KILLS:
            break
    assert counts.kills == KILLS
    assert 0 < counts.in_trial < KILLS
    assert (counts.lost, counts.repeated, counts.unreadable) == (0, 0, 0)

    study = open_study("small", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}})
    numbers = [trial.number for trial in study.trials]
    assert numbers == sorted(numbers)
