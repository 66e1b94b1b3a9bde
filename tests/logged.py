"""Collects the lines that winnow logs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def logged(on_line: Callable[[str], object] = lambda line: None) -> Iterator[list[str]]:
    """Yields the list of the lines that winnow logs inside the block; `on_line` receives each as it is logged, and may raise."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            on_line(lines[-1])

    logger, collector = logging.getLogger("winnow"), Collector()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(collector)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
