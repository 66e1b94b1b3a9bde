"""Kills `small_search` at random moments and starts it again; for `test_resume` and `bench/kill_search.py`.

A search starts as a fork of this process, which has imported everything, and so takes milliseconds instead of seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tests.search import small_search
from winnow.core.errors import UserError
from winnow.study.opening import open_study

FORK = multiprocessing.get_context("fork")
STARTING_S = 0.3  # about what a search takes until its first trial runs


@dataclass
class Counts:
    """Of finished trials and studies after kills.

    Attributes:
        in_trial: kills while a trial's child was at work; the others hit the search itself.
    """

    kills: int = 0
    in_trial: int = 0
    lost: int = 0
    repeated: int = 0
    unreadable: int = 0


def start(folder: Path, **settings: Any) -> ForkProcess:
    """A search in a process group of its own; what it prints and logs goes to `search.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    search = FORK.Process(target=_search, args=(folder, settings))
    search.start()
    with contextlib.suppress(OSError):  # both do it: whoever comes first, a kill finds the group
        os.setpgid(search.pid or 0, search.pid or 0)
    return search


def _search(folder: Path, settings: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    forkserver._forkserver.__init__()  # type: ignore[misc]  # the tests may have one already; this search has its own
    with (folder / "search.txt").open("a", buffering=1) as output:
        sys.stdout = sys.stderr = output
        logging.basicConfig(format="%(message)s", stream=output, force=True)
        logging.getLogger("winnow").setLevel(logging.INFO)
        small_search.main(folder, **settings)


def lines(path: Path) -> list[str]:
    """Whole ones: a kill may cut the last one short, and the search itself never reads these files."""
    return [line for line in path.read_text().splitlines() if line.endswith("]")] if path.exists() else []


def kill_often(folder: Path, kills: int, rng: random.Random, counts: Counts, seconds: float = 0.4) -> None:
    """Starts the search and kills its process group, over and over, until there were `kills` or it has come to its end."""
    started = folder / "started.jsonl"
    while counts.kills < kills:
        search = start(folder, seconds=seconds)
        if rng.random() < 0.25:  # while it starts, or recovers
            time.sleep(rng.uniform(0, STARTING_S))
        else:  # some way into a trial, between two, or in the book-keeping
            before = len(lines(started))
            while len(lines(started)) <= before and search.is_alive():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.4 * seconds))
        if not search.is_alive():
            break
        counts.kills += 1
        os.killpg(search.pid or 0, signal.SIGKILL)
        search.join()


def end(folder: Path, counts: Counts, seconds: float = 0.4) -> None:
    """Lets the search come to its end, and counts what was lost on the way, and what was done twice."""
    last = start(folder, seconds=seconds)
    last.join()
    try:
        study = open_study("small", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}})
        readable = last.exitcode == 0 and bool(json.loads((folder / "front.json").read_text())["points"])
    except (UserError, OSError, ValueError):
        readable = False
    if not readable:
        counts.unreadable += 1
        return
    recorded = Counter(trial.strategy.overrides for trial in study.trials)
    finished = Counter(tuple(json.loads(line)) for line in lines(folder / "finished.jsonl"))
    counts.in_trial += len(lines(folder / "started.jsonl")) - finished.total()
    counts.lost += sum(strategy not in recorded for strategy in finished) + small_search.TRIALS - len(recorded)
    counts.repeated += sum(n - 1 for n in recorded.values()) + sum(n - 1 for n in finished.values())
