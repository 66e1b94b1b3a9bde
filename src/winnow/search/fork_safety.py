"""Finds the modules whose import makes CUDA unusable in the forks of the importing process.

Once a process has started CUDA, its forks cannot use it, and some libraries start CUDA when they are imported: they query the GPUs'
capabilities or count the GPUs through the driver, which is enough. No list of such libraries exists: each module is imported in a
fork of its own, and a fork of that one tests CUDA.

    python -m winnow.search.fork_safety torch transformers bitsandbytes

prints the modules that break CUDA or cannot be imported, as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence


def unsafe_modules(modules: Sequence[str]) -> list[str]:
    """Returns the modules that a process must not import, in this order, if its forks are to use CUDA."""
    unsafe = []
    for name in modules:
        if _answer_of_fork(lambda name=name: _breaks_cuda(name)):  # type: ignore[misc]
            unsafe.append(name)
        else:
            importlib.import_module(name)
    return unsafe


def cuda_is_broken() -> bool:
    """Runs in a fork: returns whether CUDA is unusable here because it was started, or its driver called, before the fork."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())


def _breaks_cuda(name: str) -> bool:
    """Runs in a fork, which the import may break: returns whether importing the module breaks CUDA."""
    importlib.import_module(name)
    return cuda_is_broken() or _answer_of_fork(cuda_is_broken)


def _answer_of_fork(check: Callable[[], bool]) -> bool:
    """Returns the result of `check` in a fork of this process; a fork that fails or dies counts as True."""
    gc.freeze()
    pid = os.fork()
    if not pid:
        answer = True
        with contextlib.suppress(BaseException):
            answer = check()
        os._exit(int(answer))
    return os.waitpid(pid, 0)[1] != 0


if __name__ == "__main__":
    answer = os.dup(1)
    os.dup2(2, 1)  # stdout is for the result alone: prints of imported libraries go to stderr
    with os.fdopen(answer, "w") as output:
        json.dump(unsafe_modules(sys.argv[1:]), output)
