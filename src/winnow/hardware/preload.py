"""Importing this module does, once, what metering energy would otherwise do in every process.

It is made for the preload list of a fork server, whose children then start to meter in some 10 ms instead of 1.6 s:

    set_forkserver_preload(["torch", "transformers", "winnow.hardware.preload"])
"""

from __future__ import annotations

import contextlib

from winnow.hardware.energy import detect

with contextlib.suppress(ImportError):  # without codecarbon there is nothing to prepare
    detect()
