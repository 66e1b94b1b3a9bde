"""Several trials at a time; what fails on the way is tried once more, and Ctrl-C leaves nothing running."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from tests.search import kills, small_search
from winnow.agent.samplers import TPE
from winnow.core.errors import Reason, UserError
from winnow.core.types import Strategy
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import Gpu
from winnow.search import launching
from winnow.search.forecaster import Forecasts
from winnow.search.job import STOP
from winnow.search.loop import Search
from winnow.search.trial import failure
from winnow.search.views import Views
from winnow.search.workers import Workers
from winnow.study.budget import Budget
from winnow.study.opening import open_study
from winnow.study.policy import Suggestion
from winnow.study.space import read_space
from winnow.study.study import Proposal

Answer = Callable[[Strategy, int], dict[str, Any]]  # and how often it was run before -> outcome


def fine(strategy: Strategy, before: int = 0) -> dict[str, Any]:
    value = sum(map(ord, "".join(strategy.overrides)))
    figures = {"accuracy": value % 97 / 97, "size_bytes": float(value % 89)}
    return {"figures": figures, "sources": {}, "reason": None, "message": "", "seconds": {}}


class Small(Search):
    """A search over the small space whose trials are calls of `answer`."""

    def __init__(self, folder: Path, answer: Answer, **settings: Any) -> None:
        self.runs: Counter[Strategy] = Counter()

        def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
            before = self.runs[proposal.strategy.overrides]
            self.runs[proposal.strategy.overrides] += 1
            return answer(proposal.strategy, before)

        study = open_study("s", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}})
        super().__init__(
            study=study,
            space=read_space(small_search.METHODS, {}),
            policy=TPE(startup_trials=4),
            forecaster=Forecasts(lambda strategies: [{} for _ in strategies]),
            launch=launch,
            folder=folder,
            shared=[],
            views=Views(folder),
            **{"budget": Budget(trials=small_search.TRIALS)} | settings,
        )


def test_a_free_worker_gets_the_next_trial_at_once(tmp_path: Path) -> None:
    slow: list[Strategy] = []
    others = threading.Semaphore(0)

    def answer(strategy: Strategy, before: int) -> dict[str, Any]:
        if strategy.methods and not slow:
            slow.append(strategy)
            for _ in range(5):  # while five others come and go
                assert others.acquire(timeout=60)
        elif strategy.methods:
            others.release()
        return fine(strategy)

    search = Small(tmp_path, answer, workers=2)
    search.run()
    assert len(search.study.trials) == small_search.TRIALS
    ended = [trial.strategy for trial in search.study.trials]
    assert not ended[0].methods, "all others wait for the base model"
    assert ended.index(slow[0]) > 5


def test_a_crash_is_tried_once_more_and_counts_once(tmp_path: Path) -> None:
    def answer(strategy: Strategy, before: int) -> dict[str, Any]:
        bits = strategy.knobs.get("method.rtn.bits")
        if bits == 2 or (bits == 3 and not before) or (not strategy.methods and not before):
            return failure(Reason.CRASHED if bits == 2 else Reason.LOST, "the node is gone")
        return fine(strategy)

    search = Small(tmp_path, answer)
    search.run()
    runs = Counter(search.runs.values())
    assert runs == {2: 7, 1: small_search.TRIALS - 7}  # the base model, and three groups at two and at three bits
    assert search.study.run_trials == small_search.TRIALS
    assert sum(trial.complete for trial in search.study.trials) == small_search.TRIALS - 3
    assert search.study.base is not None

    again = Small(tmp_path, answer)
    again.run()
    assert not again.runs, "it starts again with what was finished"


def test_the_last_trial_of_a_budget_may_be_tried_once_more_too(tmp_path: Path) -> None:
    def answer(strategy: Strategy, before: int) -> dict[str, Any]:
        return failure(Reason.LOST, "") if strategy.methods and not before else fine(strategy)

    search = Small(tmp_path, answer, budget=Budget(trials=2))
    search.run()
    assert [trial.complete for trial in search.study.trials] == [True, False, True]


def test_a_second_attempt_is_made_after_a_restart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(trial: Any) -> None:
        raise KeyboardInterrupt

    first = Small(tmp_path, lambda strategy, before: failure(Reason.LOST, "") if strategy.methods else fine(strategy))
    monkeypatch.setattr(first, "_retry", interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(first.study.trials) == 2
    second = Small(tmp_path, lambda strategy, before: fine(strategy))
    second.run()
    assert second.study.trials[2].decision["retried"] == 1
    assert second.study.trials[2].strategy == second.study.trials[1].strategy


def test_a_base_model_that_crashes_twice_ends_the_search(tmp_path: Path) -> None:
    search = Small(tmp_path, lambda strategy, before: failure(Reason.CRASHED, "killed by SIGSEGV"))
    with pytest.raises(UserError, match="base model cannot be evaluated .*SIGSEGV"):
        search.run()
    assert search.runs.total() == 2
    repaired = Small(tmp_path, lambda strategy, before: fine(strategy))
    repaired.run()
    assert repaired.study.base is not None


def test_an_error_in_a_worker_ends_the_search_and_its_other_trials(tmp_path: Path) -> None:
    stopped = threading.Event()

    def answer(strategy: Strategy, before: int) -> dict[str, Any]:
        if not strategy.methods:
            return fine(strategy)
        if strategy.methods == ("nf4",):
            raise UserError("no way to go on")
        while not any((tmp_path / "trials").glob(f"*/{STOP}")):
            time.sleep(0.01)
        stopped.set()
        return fine(strategy)

    search = Small(tmp_path, answer, workers=13)
    with pytest.raises(UserError, match="no way"):
        search.run()
    assert stopped.is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_running_and_goes_on_later(tmp_path: Path, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "tests.search.small_search", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    search = subprocess.Popen([*line, "workers=2", "seconds=600"], cwd=root, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(kills.lines(tmp_path / "started.jsonl")) < 3:
        assert search.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started = psutil.Process(search.pid).children(recursive=True)
    assert len(started) >= 3  # the fork server and two trials
    search.send_signal(number)
    assert search.wait(timeout=120) == 130
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert (tmp_path / "front.json").exists()

    counts = kills.Counts()
    kills.end(tmp_path, counts, seconds=0.01)
    assert (counts.lost, counts.repeated, counts.unreadable) == (0, 0, 0)


def test_a_launcher_that_always_fails_is_named_and_one_that_fails_now_and_then_is_not() -> None:
    failures = launching.Failures("ray")
    for _ in range(5):
        failures.add(OSError("no route"), time.monotonic())
        failures.clear()  # a trial came back
    failures.add(OSError("no route"), time.monotonic())
    failures.add(ValueError("another"), time.monotonic())
    together = time.monotonic()
    failures.add(OSError("no route"), together)
    for _ in range(5):  # a node took six trials with it
        failures.add(OSError("no route"), together)
    failures.add(OSError("no route"), time.monotonic())
    with pytest.raises(UserError, match=r"hydra/launcher=ray has failed 3 times.*no route"):
        failures.add(OSError("no route"), time.monotonic())


@pytest.mark.parametrize(
    ("outer", "devices", "workers", "expected"),
    [
        (None, 1, 2, ["0", "1"]),
        (None, 2, 2, ["0,1", "2,3"]),
        ("2,0", 1, 2, ["2", "0"]),
        ("GPU-c, GPU-a", 1, 1, ["GPU-c"]),
    ],
)
def test_each_worker_has_its_own_gpu(
    outer: str | None, devices: int, workers: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    four_gpus(monkeypatch, outer)
    shares = launching.device_shares(Hardware("h", "cuda", devices), workers)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == expected
    assert all(("CUDA_DEVICE_ORDER" in share) == (outer is None) for share in shares)


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    four_gpus(monkeypatch, "1,2")
    with pytest.raises(UserError, match=r"workers=3 .*this machine has 2.*workers=2"):
        launching.device_shares(Hardware("h", "cuda"), 3)
    assert launching.device_shares(Hardware("h", "cpu"), 3) == [{}, {}, {}]


def four_gpus(monkeypatch: pytest.MonkeyPatch, outer: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    found = tuple(Gpu("g", f"GPU-{letter}", 8) for letter in "abcd")[: len(outer.split(",")) if outer else 4]
    monkeypatch.setattr(launching, "visible_gpus", lambda: found)


def test_an_interrupt_while_a_trial_is_being_started_leaves_nothing_to_wait_for() -> None:
    cancelled: list[int] = []
    workers = Workers(lambda proposal, worker: {}, 1)
    with mock.patch.object(threading.Thread, "start", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        workers.start(Proposal(7, Suggestion(Strategy(), "test")))
    with mock.patch("winnow.search.workers.START_S", 0.0):
        assert workers.stop(cancelled.append) == 0
    assert cancelled == [7]
