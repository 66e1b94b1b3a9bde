"""Whether importing a module spoils CUDA for the forks of the process that imports it.

CUDA that a process has started works in no fork of it, and some libraries start it when they are imported: they ask for the GPUs'
capabilities, or count them through the driver, which is enough. No list of names says which: each module is imported in a fork
of its own, and a fork of that is asked.

    python -m winnow.search.spoilt torch transformers bitsandbytes

prints those that do so, or that cannot be imported, as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence


def spoilers(modules: Sequence[str]) -> list[str]:
    """Those of the modules that must not be imported, in this order, by a process whose forks want CUDA."""
    found = []
    for name in modules:
        if _in_a_fork(lambda name=name: _spoils(name)):  # type: ignore[misc]
            found.append(name)
        else:
            importlib.import_module(name)
    return found


def is_spoilt() -> bool:
    """In a fork: whether CUDA cannot be used in this process, because it was started, or the driver asked, before the fork."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())


def _spoils(name: str) -> bool:
    """In a fork, which may be spoilt by it."""
    importlib.import_module(name)
    return is_spoilt() or _in_a_fork(is_spoilt)


def _in_a_fork(question: Callable[[], bool]) -> bool:
    """The answer that a fork of this process gives; one that fails or dies of the question counts as yes."""
    gc.freeze()
    pid = os.fork()
    if not pid:
        answer = True
        with contextlib.suppress(BaseException):
            answer = question()
        os._exit(int(answer))
    return os.waitpid(pid, 0)[1] != 0


if __name__ == "__main__":
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print when they are imported is no answer
    with os.fdopen(answer, "w") as output:
        json.dump(spoilers(sys.argv[1:]), output)
