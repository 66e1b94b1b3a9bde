"""Runs a function in a child process of the fork server: quick to start, in its own process group, with limits.

The fork server keeps torch, transformers and lm-eval imported, so a child costs milliseconds instead of seconds. A child dies with
the fork server, which dies with the search: however a search ends, no process of it stays. Where CUDA cannot be used in forks,
children are fresh processes.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from winnow.core.errors import Reason, classify, describe
from winnow.core.process import end_with_parent
from winnow.search import fork_server
from winnow.search.fork_server import PROCESS_LOCK

logger = logging.getLogger(__name__)

_RESULT_POLL_S = 0.25
_USAGE_POLL_S = 2.0  # between measurements of what a child uses


class Ended(Exception):
    """The child ended without a result.

    Attributes:
        seconds: wall time of the child.
        cpu_seconds: processor time of the child and its own children, as last measured.
    """

    seconds = 0.0
    cpu_seconds = 0.0


class Failed(Ended):
    """The child failed; carries the typed reason and a message."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Cancelled(Ended):
    """The child was ended because its result is no longer needed."""


@dataclass(frozen=True)
class Limits:
    seconds: float | None = None
    memory_bytes: float | None = None  # resident memory of the child and its children

    def check(self, seconds: float, resident_bytes: int) -> None:
        """Raises Failed if a child with this usage exceeds a limit."""
        if self.seconds and seconds > self.seconds:
            raise Failed(Reason.TIMEOUT, f"took longer than {self.seconds:.0f} s")
        if self.memory_bytes and resident_bytes > self.memory_bytes:
            raise Failed(
                Reason.OUT_OF_MEMORY,
                f"held {resident_bytes / 2**30:.2f} GiB, over the limit of {self.memory_bytes / 2**30:.2f} GiB",
            )


def call(
    function: str,
    arguments: dict[str, Any],
    limits: Limits,
    output: Path,
    prefix: str | None = "",
    environment: Mapping[str, str] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs `function` ("module:name") with `arguments` in a child and returns its result. Thread-safe.

    Args:
        function: takes the arguments; returns something that pickles.
        output: file for what the child prints.
        prefix: comes before each line of progress that winnow logs in the child; None hides the lines.
        environment: environment variables of the child besides those of the fork server.
        cancelled: polled; True kills the child.

    Raises:
        Failed: the child failed; carries the typed reason.
        Cancelled, KeyboardInterrupt: the child was killed.
    """
    context = fork_server.server.context()
    receiver: Connection
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run_call, args=(sender, function, arguments, str(output), dict(environment or {})), daemon=False
    )
    with PROCESS_LOCK:
        process.start()
    sender.close()
    started = time.monotonic()
    resident_bytes, cpu_seconds, next_usage_poll = 0, 0.0, started
    try:
        while True:
            for ready in wait([receiver, process.sentinel], timeout=_RESULT_POLL_S):
                if ready is receiver:
                    try:
                        kind, payload = receiver.recv()
                    except EOFError:
                        _join(process)
                        raise _crash_failure(process.exitcode, output) from None
                    if kind == "log":
                        _show(payload, prefix)
                    elif kind == "result":
                        return payload  # type: ignore[no-any-return]
                    else:
                        raise Failed(Reason(payload[0]), payload[1])
                elif not receiver.poll():
                    raise _crash_failure(process.exitcode, output)
            if cancelled():
                raise Cancelled(f"{function} was ended")
            if limits.memory_bytes or time.monotonic() >= next_usage_poll:
                resident_bytes, used_s = _usage(process.pid)
                cpu_seconds, next_usage_poll = max(cpu_seconds, used_s), time.monotonic() + _USAGE_POLL_S
            limits.check(time.monotonic() - started, resident_bytes)
    except Ended as ended:
        ended.seconds, ended.cpu_seconds = time.monotonic() - started, cpu_seconds
        raise
    finally:
        _kill(process)
        receiver.close()


class Service:
    """A long-lived child that answers requests until this process ends.

    Args:
        function: ("module:name") takes the arguments and returns the function that answers requests; both run in the child.
        output: file for what the child prints.
    """

    def __init__(self, function: str, arguments: dict[str, Any], output: Path) -> None:
        context = fork_server.server.context()
        self._connection, child_end = context.Pipe()
        self._output = output
        self._process = context.Process(
            target=_run_service, args=(child_end, function, arguments, str(output)), daemon=True
        )
        with PROCESS_LOCK:
            self._process.start()
        child_end.close()

    def ask(self, request: Any) -> Any:
        """Sends a request and returns the answer.

        Raises:
            Failed: the child has died, or the request raised an exception.
        """
        try:
            self._connection.send(request)
            kind, payload = self._connection.recv()
        except (EOFError, OSError):
            _join(self._process, timeout=1)
            raise _crash_failure(self._process.exitcode, self._output) from None
        if kind == "failed":
            raise Failed(Reason(payload[0]), payload[1])
        return payload

    def close(self) -> None:
        self._connection.close()
        _kill(self._process)


def load_function(function: str) -> Callable[..., Any]:
    """Returns the function with this name ("module:name")."""
    module, _, name = function.partition(":")
    target: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return target


def _show(line: str, prefix: str | None) -> None:
    """Logs a line of a child's progress in this process."""
    if prefix is not None:
        logger.info(f"{prefix}{line}")


def _set_up_child() -> None:
    os.setpgid(0, 0)
    end_with_parent()
    gc.freeze()  # keeps the garbage collector off the fork server's objects: visiting them would copy their pages


class _PipeHandler(logging.Handler):
    """Sends each line over a pipe."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("log", self.format(record)))


def _log_over(connection: Connection) -> None:
    """Sends the progress that winnow logs in this child over the pipe; warnings stay with what the child prints."""
    progress, warnings = _PipeHandler(connection), logging.StreamHandler()
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    package = logging.getLogger("winnow")
    package.handlers, package.propagate = [progress, warnings], False
    package.setLevel(logging.INFO)


def _run_service(connection: Connection, function: str, arguments: dict[str, Any], output: str) -> None:
    """Main function of the child of a `Service`."""
    _set_up_child()
    with open(output, "a", encoding="utf-8", buffering=1) as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        respond: Callable[[Any], Any] | None = None
        while True:
            try:
                request = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            try:
                if respond is None:
                    respond = load_function(function)(**arguments)
                connection.send(("answer", respond(request)))  # type: ignore[misc]
            except BaseException as error:
                traceback.print_exc()
                connection.send(("failed", (classify(error).value, describe(error))))


def _run_call(
    connection: Connection, function: str, arguments: dict[str, Any], output: str, environment: dict[str, str]
) -> None:
    """Main function of the child of `call`: prints go to a file, the result or a typed failure over the pipe."""
    _set_up_child()
    os.environ.update(environment)
    with open(output, "a", encoding="utf-8", buffering=1) as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        _log_over(connection)
        try:
            result = load_function(function)(**arguments)
            connection.send(("result", result))
        except BaseException as error:
            traceback.print_exc()
            connection.send(("failed", (classify(error).value, describe(error))))
    # everything is written; a normal exit would run the exit handlers of preloaded libraries
    os._exit(0)


def _crash_failure(code: int | None, output: Path) -> Failed:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (often the kernel's, out of memory)" if name == "SIGKILL" else ""
        return Failed(Reason.CRASHED, f"the process was killed by {name}{hint}; see {output}")
    return Failed(Reason.CRASHED, f"the process ended with code {code} and no result; see {output}")


def _kill(process: Any) -> None:
    """Kills the child's whole process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    _join(process, timeout=5)


def _join(process: Any, timeout: float | None = None) -> None:
    wait([process.sentinel], timeout)
    with PROCESS_LOCK:
        process.join(timeout=0)


def _usage(pid: int | None) -> tuple[int, float]:
    """Returns resident bytes of a process and its children, and the processor time in s of them and their ended children."""
    import psutil

    resident_bytes, cpu_seconds = 0, 0.0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            resident_bytes += process.memory_info().rss
            cpu_seconds += sum(process.cpu_times()[:4])  # user and system time, its own and of ended children
    except psutil.NoSuchProcess:
        pass
    return resident_bytes, cpu_seconds
