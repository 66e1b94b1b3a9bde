"""Items from local files, as the data set of an lm-eval task: nothing is written to a cache, and no network is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import holds_rows, rows_of, text_of


def read(files: Mapping[str, Sequence[str]], **_: Any) -> dict[str, Any]:
    """`{split: datasets.Dataset}` of files with rows, and of text files; lm-eval calls it as a task's `custom_dataset`.

    A text file is one row with the column `text`.

    Raises:
        UserError: a file that cannot be read, or is empty.
    """
    from datasets import Dataset

    found = {}
    for split, paths in files.items():
        held = [pair for path in paths for pair in rows(Path(path))]
        try:
            found[split] = Dataset.from_list([row for _, row in held])
        except (TypeError, ValueError):  # Arrow's are among them: a column has one type
            raise UserError(_odd_one(held)) from None
    return found


def rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file and where each stands, or the one row of a text file."""
    found = list(rows_of(path)) if holds_rows(path) else [(str(path), {"text": text_of(path)})]
    if not any(str(value).strip() for _, row in found for value in row.values()):
        raise UserError(f"{path} is empty; it should hold a benchmark's items")
    return found


def _odd_one(held: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Names the first field whose type is another one than in the rows before."""
    types: dict[str, tuple[str, str]] = {}
    for where, row in held:
        for field, value in row.items():
            kind = "number" if isinstance(value, int | float) else type(value).__name__
            first, before = types.setdefault(field, (where, kind))
            if value is not None and kind != before:
                return f"{where}: its field {field} is of type {kind}, and {before} in {first}; a field has one type in all rows"
    return f"{held[0][0]}: the rows do not make a table; each field must be of one type in all of them"
