"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, with the same suffix; what was written there becomes `path` at the end.

    A reader finds what was there before, or all that is new. If the writing fails, nothing of it is left.
    """
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 2, default: Callable[[Any], Any] | None = None) -> None:
    """Whole or not at all; `default` turns what JSON has no word for into something that it has (without it: TypeError)."""
    with whole(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent, default=default) + "\n", encoding="utf-8")
