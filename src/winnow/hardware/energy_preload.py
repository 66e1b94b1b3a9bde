"""Importing this module does, once, what metering energy would otherwise do in every process.

It is made for the preload list of a fork server, whose children then start to meter in some 10 ms instead of 1.6 s. Most of that
is waiting (`winnow.hardware.energy`), so a thread looks at the machine while other modules are imported. A server must not fork
before `wait` has returned; `winnow.search.preload` calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import threading

from winnow.hardware.energy import detect


def _detect() -> None:
    with contextlib.suppress(ImportError):  # codecarbon has optional parts of its own
        detect()


_detection = threading.Thread(target=_detect, name="winnow-detect", daemon=True)


def wait() -> None:
    """Returns when the machine is known."""
    if _detection.ident is not None:
        _detection.join()


with contextlib.suppress(ImportError):  # without codecarbon there is nothing to prepare
    # before the thread, which then imports little: pandas reads codecarbon's tables, cpuinfo asks for the processor
    for module in ("codecarbon.core.emissions", "cpuinfo", "pandas"):
        importlib.import_module(module)
    _detection.start()
