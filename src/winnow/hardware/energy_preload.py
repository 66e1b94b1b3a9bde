"""Detects the hardware for energy meters when it is imported, so that forked processes need not do so.

It belongs in the preload list of a fork server, whose children then start to meter in some 10 ms instead of 1.6 s. Most of that
time is waiting (`winnow.hardware.energy`), so a thread detects the hardware while other modules are imported. A server must not
fork before `wait` has returned; `winnow.search.preload` calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import threading

from winnow.hardware.energy import detect


def _detect() -> None:
    with contextlib.suppress(ImportError):  # codecarbon has optional dependencies
        detect()


_detection = threading.Thread(target=_detect, name="winnow-detect", daemon=True)


def wait() -> None:
    """Waits until the hardware has been detected."""
    if _detection.ident is not None:
        _detection.join()


with contextlib.suppress(ImportError):  # without codecarbon there is nothing to prepare
    # Imported before the thread starts, which then imports little: pandas reads codecarbon's tables, cpuinfo the processor.
    for module in ("codecarbon.core.emissions", "cpuinfo", "pandas"):
        importlib.import_module(module)
    _detection.start()
