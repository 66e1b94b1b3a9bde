"""Runs trials, each in a thread of its own: a worker that is free gets the next one at once."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from winnow.study.study import Proposal

Launch = Callable[[Proposal, int], dict[str, Any]]  # and the worker's number, from 0 -> outcome
Ended = tuple[Proposal, dict[str, Any], float]
STOP_S = 15.0  # what trials are given to end in
START_S = 1.0  # what a thread is given to start in


class Workers:
    """`count` of them.

    Threads, because whatever runs a trial (a child process, joblib, Ray, Slurm) is waited for. The caller's own thread
    only waits, and so is always there for Ctrl-C.
    """

    def __init__(self, launch: Launch, count: int) -> None:
        self._launch, self._count = launch, count
        self._free = list(range(count))[::-1]
        self._running: dict[int, tuple[Proposal, threading.Thread]] = {}
        self._ended: queue.Queue[tuple[int, Ended | BaseException]] = queue.Queue()

    @property
    def free(self) -> bool:
        return bool(self._free)

    @property
    def idle(self) -> bool:
        """Whether nothing runs, and all that did was handed over."""
        return len(self._free) == self._count

    def start(self, proposal: Proposal) -> None:
        worker = self._free.pop()
        thread = threading.Thread(
            target=self._run, args=(proposal, worker), name=f"trial {proposal.number}", daemon=True
        )
        self._running[worker] = proposal, thread
        thread.start()

    def wait(self) -> Ended:
        """The next trial that has ended.

        Raises:
            BaseException: what its launch raised.
        """
        worker, found = self._ended.get()
        del self._running[worker]
        self._free.append(worker)
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self, cancel: Callable[[int], None]) -> int:
        """Has what runs cancelled, and waits for it; returns how many trials had not ended after `STOP_S`."""
        for proposal, _ in self._running.values():
            cancel(proposal.number)
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(KeyboardInterrupt):  # once more: it cannot wait
            for _, thread in self._running.values():
                started = time.monotonic() + START_S
                while (
                    thread.ident is None and time.monotonic() < started
                ):  # the interrupt came while it was being started
                    time.sleep(0.01)
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for _, thread in self._running.values())

    def _run(self, proposal: Proposal, worker: int) -> None:
        started = time.perf_counter()
        try:
            outcome = self._launch(proposal, worker)
            self._ended.put((worker, (proposal, outcome, time.perf_counter() - started)))
        except BaseException as error:
            self._ended.put((worker, error))
