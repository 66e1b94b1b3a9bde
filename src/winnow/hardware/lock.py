"""Locks devices: a measurement uses a device exclusively, all other work shares it.

Each device (each GPU is one) has two lock files in the temporary folder, so that all processes of a machine use the same ones.
The kernel releases `flock` locks when their process dies, so no lock outlives its process. The second file is a turnstile: a
waiting measurement holds it, so that no new work starts and the measurement waits only for running work.

    with exclusive_device("cpu"): ...   # latency, energy, peak memory
    with shared_device("cpu"): ...      # compressing, scoring

The two do not nest: a process that shares the device and requests it exclusively waits for itself.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from winnow.hardware.inventory import visible_gpus

logger = logging.getLogger(__name__)

PATIENCE_S = 3.0  # a longer wait is logged
_POLL_S = 0.02


@contextmanager
def exclusive_device(device: str) -> Iterator[None]:
    """Holds the device for a measurement: meanwhile no other process measures on it or starts to share it."""
    with ExitStack() as stack:
        for name in _devices(device):
            stack.enter_context(_locked(name, "turn", fcntl.LOCK_EX, "measure"))
            stack.enter_context(_locked(name, "use", fcntl.LOCK_EX, "measure"))
        yield


@contextmanager
def shared_device(device: str) -> Iterator[None]:
    """Shares the device with other work, but never with a measurement."""
    with ExitStack() as stack:
        for name in _devices(device):
            with _locked(name, "turn", fcntl.LOCK_SH, "go on"):
                stack.enter_context(_locked(name, "use", fcntl.LOCK_SH, "go on"))
        yield


def _devices(device: str) -> list[str]:
    """Returns the names to lock: each GPU that this process may use, or the device itself.

    All processes lock them in the same order, so that no two processes wait for each other.
    """
    return sorted(gpu.uuid for gpu in visible_gpus()) or [device] if device == "cuda" else [device]


def lock_path(device: str, part: str) -> Path:
    return Path(tempfile.gettempdir()) / f"winnow-{re.sub(r'[^A-Za-z0-9]', '_', device)}.{part}.lock"


@contextmanager
def _locked(device: str, part: str, kind: int, purpose: str) -> Iterator[None]:
    # Read-only and readable by all: another user's lock file in a sticky folder may be opened but not written.
    descriptor = os.open(lock_path(device, part), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, logged = time.monotonic(), False
        while not _try_lock(descriptor, kind):
            if not logged and time.monotonic() - started > PATIENCE_S:
                logger.info(f"waiting for {device} to be free, to {purpose}")
                logged = True
            time.sleep(_POLL_S)
        if logged:
            logger.info(f"waited {time.monotonic() - started:.0f} s for {device}")
        yield
    finally:
        os.close(descriptor)  # releases the lock


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
