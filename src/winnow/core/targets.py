"""Resolves a `_target_` of the configuration to a class or function."""

from __future__ import annotations

import importlib
from typing import Any


def target_of(path: str) -> Any:
    """Returns the class or function that a `_target_` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
