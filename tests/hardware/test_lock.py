"""A measurement excludes everything, shared use excludes measurements, and the dead hold nothing."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.logged import logged
from winnow.hardware import lock
from winnow.hardware.inventory import Gpu

FORK = multiprocessing.get_context("fork")


def _hold(hold: Callable[..., Any], device: str, pipe: Connection) -> None:
    """Says when it has the device, and keeps it until told."""
    with logged(pipe.send), hold(device):
        pipe.send("held")
        pipe.recv()
    pipe.send("given up")


class Holder:
    """Another process that asks for the device."""

    def __init__(self, hold: Callable[..., Any], device: str = "cpu") -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_hold, args=(hold, device, theirs), daemon=True)
        self.process.start()

    def says(self, line: str, within_s: float = 30) -> bool:
        return self.pipe.poll(within_s) and self.pipe.recv() == line

    def let_go(self) -> None:
        self.pipe.send(None)
        assert self.says("given up")
        self.process.join()


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (lock.exclusive_device, lock.exclusive_device, False),
        (lock.exclusive_device, lock.shared_device, False),
        (lock.shared_device, lock.exclusive_device, False),
        (lock.shared_device, lock.shared_device, True),
    ],
)
def test_who_may_be_there_together(first: Any, second: Any, together: bool) -> None:
    one = Holder(first)
    assert one.says("held")
    two = Holder(second)
    assert two.says("held", within_s=30 if together else 0.3) is together
    one.let_go()
    assert together or two.says("held")
    two.let_go()


def test_no_new_work_slips_past_a_waiting_measurement() -> None:
    working = Holder(lock.shared_device)
    assert working.says("held")
    measuring = Holder(lock.exclusive_device)
    assert not measuring.says("held", within_s=0.3)
    late = Holder(lock.shared_device)
    assert not late.says("held", within_s=0.3)
    working.let_go()
    assert measuring.says("held")
    measuring.let_go()
    assert late.says("held")
    late.let_go()


def test_a_killed_holder_holds_nothing() -> None:
    killed = Holder(lock.exclusive_device)
    assert killed.says("held")
    assert killed.process.pid is not None
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.join()
    with lock.exclusive_device("cpu"):
        pass


def test_a_long_wait_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
    one = Holder(lock.exclusive_device)
    assert one.says("held")
    two = Holder(lock.exclusive_device)
    assert two.says("waiting for cpu to be free, to measure")
    one.let_go()
    assert two.says("waited 0 s for cpu")
    assert two.says("held")
    two.let_go()


def test_devices_have_locks_of_their_own() -> None:
    with lock.exclusive_device("cpu"), lock.exclusive_device("cuda"):
        descriptor = os.open(lock.lock_path("cpu", "use"), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(descriptor)


def test_gpus_have_locks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Gpu("g", "GPU-a", 8), Gpu("g", "GPU-b", 8)
    monkeypatch.setattr(lock, "visible_gpus", lambda: (second,))
    one = Holder(lock.exclusive_device, "cuda")
    assert one.says("held")
    monkeypatch.setattr(lock, "visible_gpus", lambda: (first,))
    with lock.exclusive_device("cuda"), lock.exclusive_device("cpu"):
        pass
    monkeypatch.setattr(lock, "visible_gpus", lambda: (first, second))
    both = Holder(lock.exclusive_device, "cuda")
    assert not both.says("held", within_s=0.3)
    one.let_go()
    assert both.says("held")
    both.let_go()
