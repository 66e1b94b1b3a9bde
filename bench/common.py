"""What benches share: repeated timings, progress on the terminal, and the table and JSON line that each ends with."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    name: str
    value: float
    target: float
    better: str  # "lower" or "higher"

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `work` in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def command(*arguments: str) -> str:
    """Runs `python <arguments>` in the repository and returns what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def show_progress() -> None:
    """Shows the progress that winnow logs, on standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("winnow").setLevel(logging.INFO)


_held: list[Callable[[Any], Any]] = []  # what a pool is to do: its processes inherit it, so it need not pickle


def _call(task: Any) -> Any:
    return _held[-1](task)


def spread(work: Callable[[Any], Any], tasks: Iterable[Any]) -> list[Any]:
    """`work` of each task, on all cores, in processes that share what this one has loaded by then."""
    _held.append(work)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        found = pool.map(_call, tasks, chunksize=1)
    _held.pop()
    return found


def report(bench: str, results: Sequence[Result]) -> None:
    """Prints the table and, as the last line, the JSON."""
    width = max(len(r.name) for r in results)
    for r in results:
        sign = "<=" if r.better == "lower" else ">="
        print(f"{r.name:<{width}}  {r.value:10.3f}  target {sign} {r.target:g}  {'met' if r.met else 'MISSED'}")
    rows = [{"name": r.name, "value": r.value, "target": r.target, "better": r.better, "met": r.met} for r in results]
    print(json.dumps({"bench": bench, "results": rows, "met": all(r.met for r in results)}))
