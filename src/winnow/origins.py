"""Where an error comes from: what it was raised from, and in whose code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on: libraries wrap the errors of others."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raised_below(error: BaseException, folder: Path) -> bool:
    """Whether the code that raised an error lies in a folder."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).is_relative_to(folder)
