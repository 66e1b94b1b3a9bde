"""What a `_target_` of the configuration names."""

from __future__ import annotations

import importlib
from typing import Any


def target_of(path: str) -> Any:
    """The class or function that a `_target_` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
