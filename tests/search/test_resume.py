"""Killed anywhere and started again, a search loses and repeats no finished trial."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.search.small_search import OBJECTIVES, TRIALS
from winnow.search.study import open_study

KILLS = 20


def lines(path: Path) -> list[str]:
    # a kill may cut the last line short; the search itself never reads these files
    return [line for line in path.read_text().splitlines() if line.endswith("]")] if path.exists() else []


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.search.small_search", str(folder)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, cwd=root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_often(folder: Path, kills: int, rng: random.Random) -> int:
    """Starts the search and kills it, up to `kills` times; returns how often, less if it came to its end before."""
    for killed in range(kills):
        search = start(folder)
        before = len(lines(folder / "started.jsonl"))
        # let it come to its work, then kill it some way into it: into a trial, between two, or in the book-keeping
        while len(lines(folder / "started.jsonl")) <= before and search.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.55))
        if search.poll() is not None:
            return killed
        os.killpg(search.pid, signal.SIGKILL)
        search.wait()
    return kills


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(20)
    killed = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        killed += kill_often(folder, KILLS - killed, rng)
        check_whole(folder)
        if killed == KILLS:
            break
    assert killed == KILLS


def check_whole(folder: Path) -> None:
    """Ends the search, and sees that nothing was lost on the way and nothing done twice."""
    last = start(folder)
    _, errors = last.communicate(timeout=240)
    assert last.returncode == 0, errors.decode()

    study = open_study("small", f"sqlite:///{folder / 'study.db'}", OBJECTIVES, {"model": "m"})
    recorded = Counter(trial.strategy.overrides for trial in study.trials)
    assert len(recorded) == TRIALS
    assert max(recorded.values()) == 1, "a finished trial was counted twice"
    finished = Counter(tuple(json.loads(line)) for line in lines(folder / "finished.jsonl"))
    assert max(finished.values()) == 1, "a finished trial was run again"
    assert set(finished) <= set(recorded), "a finished trial was lost"
    numbers = [trial.number for trial in study.trials]
    assert numbers == sorted(numbers)
    assert json.loads((folder / "front.json").read_text())["points"]
