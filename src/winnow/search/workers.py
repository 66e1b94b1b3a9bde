"""Runs each trial in a thread of its own; a free worker gets the next trial at once."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from winnow.study.study import Proposal

Launch = Callable[[Proposal, int], dict[str, Any]]  # (proposal, worker number from 0) -> outcome
EndedTrial = tuple[Proposal, dict[str, Any], float]
STOP_S = 15.0  # time for trials to end
START_S = 1.0  # time for a thread to start


class Workers:
    """Runs up to `count` trials at the same time.

    Workers are threads, because they only wait for whatever runs the trial (a child process, joblib, Ray, Slurm). The caller's own
    thread only waits, too, and so can always react to Ctrl-C.
    """

    def __init__(self, launch: Launch, count: int) -> None:
        self._launch, self._count = launch, count
        self._free = list(range(count))[::-1]
        self._running: dict[int, tuple[Proposal, threading.Thread]] = {}
        self._results: queue.Queue[tuple[int, EndedTrial | BaseException]] = queue.Queue()

    @property
    def free(self) -> bool:
        return bool(self._free)

    @property
    def idle(self) -> bool:
        """Whether no trial runs and `wait` has returned all ended trials."""
        return len(self._free) == self._count

    def start(self, proposal: Proposal) -> None:
        worker = self._free.pop()
        thread = threading.Thread(
            target=self._run, args=(proposal, worker), name=f"trial {proposal.number}", daemon=True
        )
        self._running[worker] = proposal, thread
        thread.start()

    def wait(self) -> EndedTrial:
        """Waits for the next trial to end; returns its proposal, its outcome and its wall time in s.

        Raises:
            BaseException: whatever the launch of the trial raised.
        """
        worker, result = self._results.get()
        del self._running[worker]
        self._free.append(worker)
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self, cancel: Callable[[int], None]) -> int:
        """Cancels all running trials and waits for them; returns the number of trials that still run after `STOP_S`."""
        for proposal, _ in self._running.values():
            cancel(proposal.number)
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait
            for _, thread in self._running.values():
                start_deadline = time.monotonic() + START_S
                # the interrupt may have come while the thread was being started
                while thread.ident is None and time.monotonic() < start_deadline:
                    time.sleep(0.01)
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for _, thread in self._running.values())

    def _run(self, proposal: Proposal, worker: int) -> None:
        started = time.perf_counter()
        try:
            outcome = self._launch(proposal, worker)
            self._results.put((worker, (proposal, outcome, time.perf_counter() - started)))
        except BaseException as error:
            self._results.put((worker, error))
