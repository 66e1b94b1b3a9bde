"""Who may use the device: a measurement holds it alone, everything else shares it.

Two lock files a device (each GPU is one) in the temporary folder, so that all processes of a machine meet there. `flock` locks
are given up by the kernel when their process dies, however it dies: nothing is ever left locked. The second file is a turnstile:
a waiting measurement holds it, so that no new work slips past and the measurement waits only for what already runs.

    with alone("cpu", print): ...   # latency, energy, peak memory
    with sharing("cpu"): ...        # compressing, scoring

The two do not nest: a process that shares the device and asks for it alone waits for itself.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from winnow.hardware.inventory import visible_gpus

PATIENCE_S = 3.0  # a longer wait is worth a line in the log
_POLL_S = 0.02


@contextmanager
def exclusive_device(device: str, log: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the device for a measurement: no other process measures, and none starts to share it, meanwhile."""
    with ExitStack() as stack:
        for one in _devices(device):
            stack.enter_context(_held(one, "turn", fcntl.LOCK_EX, log, "measure"))
            stack.enter_context(_held(one, "use", fcntl.LOCK_EX, log, "measure"))
        yield


@contextmanager
def shared_device(device: str, log: Callable[[str], None] = print) -> Iterator[None]:
    """Uses the device beside others, but never beside a measurement."""
    with ExitStack() as stack:
        for one in _devices(device):
            with _held(one, "turn", fcntl.LOCK_SH, log, "go on"):
                stack.enter_context(_held(one, "use", fcntl.LOCK_SH, log, "go on"))
        yield


def _devices(device: str) -> list[str]:
    """The GPUs that this process may use, each by itself: those of another are not in its way.

    In one order for all processes, so that none waits for another that waits for it.
    """
    return sorted(gpu.uuid for gpu in visible_gpus()) or [device] if device == "cuda" else [device]


def lock_path(device: str, part: str) -> Path:
    return Path(tempfile.gettempdir()) / f"winnow-{re.sub(r'[^A-Za-z0-9]', '_', device)}.{part}.lock"


@contextmanager
def _held(device: str, part: str, kind: int, log: Callable[[str], None], purpose: str) -> Iterator[None]:
    # read-only and readable by all: another user's lock file in a sticky folder may be opened, not written
    descriptor = os.open(lock_path(device, part), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, said = time.monotonic(), False
        while not _taken(descriptor, kind):
            if not said and time.monotonic() - started > PATIENCE_S:
                log(f"waiting for {device} to be free, to {purpose}")
                said = True
            time.sleep(_POLL_S)
        if said:
            log(f"waited {time.monotonic() - started:.0f} s for {device}")
        yield
    finally:
        os.close(descriptor)  # gives up the lock


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
