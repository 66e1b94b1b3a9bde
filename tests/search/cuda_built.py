"""Importing this makes torch look as if it were built for CUDA, with a GPU that NVML knows and a driver that must not be asked.

What asks the driver is noted, and spoils the forks that come after it, as the real one does.
"""

from __future__ import annotations

import os
from typing import Any

import torch

asked: list[str] = []  # by this process, or by one that it was forked from
_before_the_fork = False


def _count() -> int:
    asked.append("_cuda_getDeviceCount")
    return 1


def _init() -> None:
    asked.append("_cuda_init")
    raise RuntimeError("this driver does not answer")


def _forked() -> None:
    global _before_the_fork  # noqa: PLW0603
    _before_the_fork = bool(asked)


built: Any = torch
built._C._cuda_getDeviceCount = _count
built._C._cuda_init = _init
built._C._cuda_getCurrentRawStream = lambda device: 0
built.version.cuda = "13.0"
built.cuda._is_compiled = lambda: True
built.cuda._cudart = object()
built.cuda._device_count_nvml = lambda: 1
built.cuda._is_in_bad_fork = lambda: _before_the_fork
os.register_at_fork(after_in_child=_forked)
