"""The models and the workload of `tests/hardware`."""

from __future__ import annotations

from tests.hardware.conftest import _apart, folder, hardware, make_llama

__all__ = ["_apart", "folder", "hardware", "make_llama"]
