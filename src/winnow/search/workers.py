"""Runs trials, one in this thread or several at a time: a worker that is free gets the next one at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from winnow.search.study import Proposal

Launch = Callable[[Proposal, int], dict[str, Any]]  # and the worker's number, from 0 -> outcome
Ended = tuple[Proposal, dict[str, Any], float]


class Workers:
    """`count` of them; with one, `start` returns when its trial has ended."""

    def __init__(self, launch: Launch, count: int) -> None:
        self._launch, self._count = launch, count
        self._free = list(range(count))[::-1]
        self._ended: queue.Queue[tuple[int, Ended | BaseException]] = queue.Queue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Threads are daemons: what they wait for ends with this process."""

    @property
    def free(self) -> bool:
        return bool(self._free)

    @property
    def idle(self) -> bool:
        """Whether nothing runs, and all that did was handed over."""
        return len(self._free) == self._count

    def start(self, proposal: Proposal) -> None:
        worker = self._free.pop()
        if self._count == 1:
            self._ended.put((worker, self._run(proposal, worker)))
        else:
            threading.Thread(target=self._run_aside, args=(proposal, worker), daemon=True).start()

    def wait(self) -> Ended:
        """The next trial that has ended.

        Raises:
            BaseException: what its launch raised.
        """
        while True:
            try:
                worker, found = self._ended.get(timeout=0.5)  # Ctrl-C is noticed between
                break
            except queue.Empty:
                continue
        self._free.append(worker)
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self, proposal: Proposal, worker: int) -> Ended:
        started = time.perf_counter()
        outcome = self._launch(proposal, worker)
        return proposal, outcome, time.perf_counter() - started

    def _run_aside(self, proposal: Proposal, worker: int) -> None:
        try:
            self._ended.put((worker, self._run(proposal, worker)))
        except BaseException as error:
            self._ended.put((worker, error))
