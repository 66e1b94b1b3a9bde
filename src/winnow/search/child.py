"""Runs a function in a child process of a fork server: quick to start, alone in its process group, with limits.

The fork server keeps torch, transformers and lm-eval imported, so a child costs milliseconds instead of seconds. A child dies
with the fork server, which dies with the search: whatever way a search ends, nothing of it is left running. Where CUDA cannot be
used in forks, children are fresh processes.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from winnow.core.cli import say
from winnow.core.errors import Reason, classify, describe
from winnow.core.process import end_with_parent
from winnow.search import spoilt

PRELOAD = (
    "winnow.search.preload",
    "lm_eval",
)  # for every trial; the first knows how to import torch and transformers quickly
_POLL_S = 0.25
_LOOK_S = 2.0  # between looks at what a child has used
_BOOKS = threading.Lock()  # multiprocessing keeps account of children in a way that is not made for several threads


class Ended(Exception):
    """The child has no result.

    Attributes:
        seconds: that it took.
        cpu_seconds: of processor time, its children's included, by the last look at it.
    """

    seconds = 0.0
    cpu_seconds = 0.0


class Failed(Ended):
    """The child did not finish; why, in a word and in words."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Cancelled(Ended):
    """The child was ended because nobody waits for its result any more."""


@dataclass(frozen=True)
class Limits:
    seconds: float | None = None
    memory_bytes: int | None = None  # resident, of the child and its children

    def check(self, seconds: float, resident_bytes: int) -> None:
        """Raises Failed if a child that has taken so much is over one of them."""
        if self.seconds and seconds > self.seconds:
            raise Failed(Reason.TIMEOUT, f"took longer than {self.seconds:.0f} s")
        if self.memory_bytes and resident_bytes > self.memory_bytes:
            raise Failed(
                Reason.OUT_OF_MEMORY,
                f"held {resident_bytes / 2**30:.2f} GiB, over the limit of {self.memory_bytes / 2**30:.2f} GiB",
            )


class _Server:
    """The fork server of this process, and what was seen of its children.

    Attributes:
        modules: that it imports.
        left_out: of those that were wanted, the ones that would spoil CUDA for children (`winnow.search.spoilt`).
        method: of `multiprocessing`, by which children are started: `spawn` where CUDA is spoilt in every fork.
    """

    def __init__(self) -> None:
        self.modules: tuple[str, ...] = PRELOAD
        self.left_out: tuple[str, ...] = ()
        self.method = "forkserver"
        self._looked_at = False
        self._lock = threading.Lock()

    def want(self, modules: Sequence[str]) -> None:
        """Starts it, if there is none, with these modules to import."""
        with self._lock:
            if not self._looked_at:
                self.modules = tuple(modules)
            self._start()

    def _start(self) -> None:
        from multiprocessing import forkserver

        # torch then counts GPUs through NVML and not through the driver, which would spoil CUDA in every fork
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # a child is told how this process starts others, and must know that way: it does not know the one of joblib's workers
        if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
            multiprocessing.set_start_method("forkserver", force=True)
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(self.modules))
        forkserver.ensure_running()

    def context(self, log: Callable[[str], None]) -> Any:
        """How to start a child. The first time a child is looked at, and what spoils CUDA in it is left out."""
        with self._lock:
            self._start()
            if not self._looked_at:
                if self._child_is_spoilt():
                    self._mend(log)
                self._looked_at = True
        return multiprocessing.get_context(self.method)

    def _mend(self, log: Callable[[str], None]) -> None:
        from multiprocessing import forkserver

        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        command = [sys.executable, "-m", spoilt.__name__, *self.modules]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        self.left_out = tuple(json.loads(done.stdout or "[]"))
        for name in self.left_out:
            log(f"{name} starts CUDA when it is imported, or cannot be imported: it is left to each trial")
        self.modules = tuple(name for name in self.modules if name not in self.left_out)
        self._start()
        if self._child_is_spoilt():
            log("CUDA cannot be used in a fork here: each trial starts a fresh process, which takes seconds")
            self.method = "spawn"

    def _child_is_spoilt(self) -> bool:
        """Whether a child could not use CUDA, or cannot even be started."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(theirs,))
        try:
            with _BOOKS:
                process.start()
            theirs.close()
            return bool(ours.recv())
        except (EOFError, OSError):  # the server has died of an import
            return True
        finally:
            ours.close()


_server = _Server()


def start_server(extra: Sequence[str] = ()) -> None:
    """Starts the fork server; it goes on importing (`PRELOAD` and `extra`) in the background while the caller prepares."""
    _server.want((*PRELOAD, *extra))


def left_out() -> tuple[str, ...]:
    """The modules that children import by themselves."""
    _server.context(say)
    return _server.left_out


def _look(connection: Connection) -> None:
    """In a child."""
    connection.send(spoilt.is_spoilt())
    os._exit(0)


def call(
    function: str,
    arguments: dict[str, Any],
    limits: Limits,
    log: Callable[[str], None],
    output: Path,
    environment: Mapping[str, str] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """What `function` ("module:name") returns for `arguments`, computed in a child. Several threads may call at once.

    Args:
        function: takes the arguments and a `log` callable; returns something that pickles.
        output: a file for what the child prints.
        environment: variables that the child has beside those of the fork server.
        cancelled: asked now and then whether the result is still wanted.

    Raises:
        Failed: with the typed reason.
        Cancelled, KeyboardInterrupt: after the child was killed.
    """
    context = _server.context(log)
    ours: Connection
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_main, args=(theirs, function, arguments, str(output), dict(environment or {})), daemon=False
    )
    with _BOOKS:
        process.start()
    theirs.close()
    started = time.monotonic()
    resident_bytes, cpu_seconds, next_look = 0, 0.0, started
    try:
        while True:
            for ready in wait([ours, process.sentinel], timeout=_POLL_S):
                if ready is ours:
                    try:
                        kind, payload = ours.recv()
                    except EOFError:
                        _join(process)
                        raise _death(process.exitcode, output) from None
                    if kind == "log":
                        log(payload)
                    elif kind == "result":
                        return payload  # type: ignore[no-any-return]
                    else:
                        raise Failed(Reason(payload[0]), payload[1])
                elif not ours.poll():
                    raise _death(process.exitcode, output)
            if cancelled():
                raise Cancelled(f"{function} was ended")
            if limits.memory_bytes or time.monotonic() >= next_look:
                resident_bytes, used_s = _usage(process.pid)
                cpu_seconds, next_look = max(cpu_seconds, used_s), time.monotonic() + _LOOK_S
            limits.check(time.monotonic() - started, resident_bytes)
    except Ended as ended:
        ended.seconds, ended.cpu_seconds = time.monotonic() - started, cpu_seconds
        raise
    finally:
        _kill(process)
        ours.close()


class Service:
    """A function in a child that answers as long as this process lives: made once, asked often.

    Args:
        function: ("module:name") takes the arguments and returns what answers; both run in the child.
        output: a file for what the child prints.
    """

    def __init__(self, function: str, arguments: dict[str, Any], output: Path) -> None:
        context = _server.context(say)
        self._ours, theirs = context.Pipe()
        self._output = output
        self._process = context.Process(target=_serve, args=(theirs, function, arguments, str(output)), daemon=True)
        with _BOOKS:
            self._process.start()
        theirs.close()

    def ask(self, question: Any) -> Any:
        """The answer.

        Raises:
            Failed: the child has died, or its answer was an exception.
        """
        try:
            self._ours.send(question)
            kind, payload = self._ours.recv()
        except (EOFError, OSError):
            _join(self._process, timeout=1)
            raise _death(self._process.exitcode, self._output) from None
        if kind == "failed":
            raise Failed(Reason(payload[0]), payload[1])
        return payload

    def close(self) -> None:
        self._ours.close()
        _kill(self._process)


def named(function: str) -> Callable[..., Any]:
    """The function of a name ("module:name")."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _begin() -> None:
    os.setpgid(0, 0)
    end_with_parent()
    gc.freeze()  # the collector leaves alone what the fork server made: to look at it would copy its pages


def _serve(connection: Connection, function: str, arguments: dict[str, Any], output: str) -> None:
    """The child of a `Service`."""
    _begin()
    with open(output, "a", encoding="utf-8", buffering=1) as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        answer: Callable[[Any], Any] | None = None
        while True:
            try:
                question = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            try:
                if answer is None:
                    answer = named(function)(**arguments)
                connection.send(("answer", answer(question)))  # type: ignore[misc]
            except BaseException as error:
                traceback.print_exc()
                connection.send(("failed", (classify(error).value, describe(error))))


def _main(
    connection: Connection, function: str, arguments: dict[str, Any], output: str, environment: dict[str, str]
) -> None:
    """The child: its own process group, output to a file, result or typed failure over the pipe."""
    _begin()
    os.environ.update(environment)
    with open(output, "a", encoding="utf-8", buffering=1) as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            result = named(function)(**arguments, log=lambda line: connection.send(("log", line)))
            connection.send(("result", result))
        except BaseException as error:
            traceback.print_exc()
            connection.send(("failed", (classify(error).value, describe(error))))
    # interpreter shutdown would run exit handlers of libraries that the parent preloaded; everything is written by now
    os._exit(0)


def _death(code: int | None, output: Path) -> Failed:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (often the kernel's, out of memory)" if name == "SIGKILL" else ""
        return Failed(Reason.CRASHED, f"the process was killed by {name}{hint}; see {output}")
    return Failed(Reason.CRASHED, f"the process ended with code {code} and no result; see {output}")


def _kill(process: Any) -> None:
    """Ends the child's whole process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    _join(process, timeout=5)


def _join(process: Any, timeout: float | None = None) -> None:
    wait([process.sentinel], timeout)
    with _BOOKS:
        process.join(timeout=0)


def _usage(pid: int | None) -> tuple[int, float]:
    """Resident bytes of a process and its children now, and the processor time in s that they and their ended children used."""
    import psutil

    resident_bytes, cpu_seconds = 0, 0.0
    try:
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            resident_bytes += one.memory_info().rss
            cpu_seconds += sum(one.cpu_times()[:4])  # user, system, and those of children that it has waited for
    except psutil.NoSuchProcess:
        pass
    return resident_bytes, cpu_seconds
