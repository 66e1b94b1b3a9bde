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


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(20)
    killed = 0
    while killed < KILLS:
        search = start(tmp_path)
        before = len(lines(tmp_path / "started.jsonl"))
        deadline = time.monotonic() + 60
        # let it come to its work, then kill it some way into it: into a trial, between two, or in the book-keeping
        while (
            len(lines(tmp_path / "started.jsonl")) <= before and search.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.55))
        if search.poll() is not None:
            break
        os.killpg(search.pid, signal.SIGKILL)
        search.wait()
        killed += 1
    assert killed == KILLS, "the search ended before it could be killed often enough"
    last = start(tmp_path)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors.decode()

    study = open_study("small", f"sqlite:///{tmp_path / 'study.db'}", OBJECTIVES, {"model": "m"})
    recorded = Counter(trial.strategy.overrides for trial in study.trials)
    assert len(recorded) == TRIALS
    assert max(recorded.values()) == 1, "a finished trial was counted twice"
    finished = Counter(tuple(json.loads(line)) for line in lines(tmp_path / "finished.jsonl"))
    assert max(finished.values()) == 1, "a finished trial was run again"
    assert set(finished) <= set(recorded), "a finished trial was lost"
    numbers = [trial.number for trial in study.trials]
    assert numbers == sorted(numbers)
    assert json.loads((tmp_path / "front.json").read_text())["points"]
