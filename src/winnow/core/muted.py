"""Hides the progress that winnow logs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hides winnow's progress inside the block, in all threads; warnings still appear."""
    logger = logging.getLogger("winnow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
