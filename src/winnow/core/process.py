"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Lets the kernel send this process a signal when its parent dies, which may be killed and could not tell it then.

    A parent that died meanwhile ends it now. Elsewhere than on Linux nothing is done.
    """
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os._exit(1)
