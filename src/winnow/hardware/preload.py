"""Importing this module does, once, what metering energy would otherwise do in every process: for a fork server's preload list.

    multiprocessing.set_forkserver_preload(["torch", "transformers", "winnow.hardware.preload"])
"""

from __future__ import annotations

import contextlib

from winnow.hardware.energy import detect

with contextlib.suppress(ImportError):  # without codecarbon there is nothing to prepare
    detect()
