"""Functions that the tests run in child processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("winnow.workers")


def add(a: int, b: int) -> dict[str, int]:
    logger.info("adding")
    logger.warning(f"{a} and {b} are small")
    print("printed by the child")
    return {"sum": a + b, "group": os.getpgid(0), "pid": os.getpid()}


def fail(kind: str) -> dict[str, Any]:
    from winnow.core.errors import MissingExtra, UserError

    errors: dict[str, BaseException] = {
        "value": ValueError("a bad value"),
        "user": UserError("method.x=1 is out of range"),
        "missing": MissingExtra("somelib", "some"),
        "memory": MemoryError(),
        "torch_memory": RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        "disk": OSError(28, "No space left on device"),
        "exit": SystemExit(3),
    }
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "vanish":
        os._exit(7)
    raise errors[kind]


def variable(name: str) -> dict[str, str | None]:
    return {name: os.environ.get(name)}


def hang() -> None:
    """Hangs with a child of its own, and says the process ids."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    logger.info(f"{os.getpid()} {other.pid}")
    time.sleep(600)


def swell() -> None:
    held = []
    for _ in range(10_000):
        held.append(bytearray(os.urandom(2**20)) * 16)
        time.sleep(0.01)


def work(overrides: list[str], seconds: float, started: str) -> dict[str, float]:
    """Stands for compressing and evaluating: a figure that depends on the strategy alone, after a while."""
    with Path(started).open("a", encoding="utf-8") as file:
        file.write(json.dumps(overrides) + "\n")
    time.sleep(seconds)
    value = sum(map(ord, "".join(overrides)))
    return {"accuracy": value % 97 / 97, "size_bytes": float(value % 89)}


def cuda() -> dict[str, Any]:
    """Whether this process could use CUDA, and what it was given to begin with."""
    imported = sorted(sys.modules)
    import torch

    return {
        "initialized": torch.cuda.is_initialized(),
        "bad_fork": torch.cuda._is_in_bad_fork(),
        "imported": imported,
    }


def burn(composed: dict[str, Any], end: str) -> dict[str, Any]:
    """A step of a job that works for a moment, and then comes to this end."""
    until = time.process_time() + 0.3
    while time.process_time() < until:
        sum(range(10_000))
    logger.info("burnt")
    if end == "killed":
        time.sleep(2.2)  # until it was looked at
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "hangs":
        time.sleep(600)
    if end == "fails":
        raise ValueError("half way")
    return {"figures": 1}
