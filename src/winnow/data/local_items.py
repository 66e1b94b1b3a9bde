"""Loads items from local files as the data set of an lm-eval task, without a cache and without the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import is_rows_file, read_rows, read_text


def read(files: Mapping[str, Sequence[str]], **_: Any) -> dict[str, Any]:
    """Returns `{split: datasets.Dataset}`; lm-eval calls this function as a task's `custom_dataset`.

    A text file becomes one row with the column `text`.

    Raises:
        UserError: a file cannot be read or is empty, or a field has several types.
    """
    from datasets import Dataset

    datasets = {}
    for split, paths in files.items():
        located_rows = [pair for path in paths for pair in rows(Path(path))]
        try:
            datasets[split] = Dataset.from_list([row for _, row in located_rows])
        except (TypeError, ValueError):  # includes Arrow's errors: a column has one type
            raise UserError(_type_mismatch(located_rows)) from None
    return datasets


def rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a file, or the one row of a text file, each with its location."""
    located_rows = list(read_rows(path)) if is_rows_file(path) else [(str(path), {"text": read_text(path)})]
    if not any(str(value).strip() for _, row in located_rows for value in row.values()):
        raise UserError(f"{path} is empty; it should hold a benchmark's items")
    return located_rows


def _type_mismatch(located_rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Returns an error message about the first field whose type differs from its type in earlier rows."""
    types: dict[str, tuple[str, str]] = {}
    for where, row in located_rows:
        for field, value in row.items():
            kind = "number" if isinstance(value, int | float) else type(value).__name__
            first, expected = types.setdefault(field, (where, kind))
            if value is not None and kind != expected:
                return f"{where}: its field {field} is of type {kind}, and {expected} in {first}; a field has one type in all rows"
    return f"{located_rows[0][0]}: the rows do not make a table; each field must be of one type in all of them"
