"""Ends child processes when their parent dies."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Makes the kernel send this process a signal when its parent dies, even if the parent is killed.

    The process exits at once if the parent died during the call. The function does nothing outside Linux.
    """
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os._exit(1)
