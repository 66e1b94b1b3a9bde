"""Items from local files, as the data set of an lm-eval task: nothing is written to a cache, and no network is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.types import UserError


def read(files: Mapping[str, Sequence[str]], **_: Any) -> dict[str, Any]:
    """`{split: datasets.Dataset}` of JSONL and text files; lm-eval calls it as a task's `custom_dataset`.

    A text file is one row with the column `text`.

    Raises:
        UserError: a file that is not JSONL, or is empty.
    """
    from datasets import Dataset

    return {
        split: Dataset.from_list([row for path in paths for row in rows(Path(path))]) for split, paths in files.items()
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file, or the one row of any other, which is text."""
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"{path} is empty; it should hold a benchmark's items")
    if path.suffix != ".jsonl":
        return [{"text": text}]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error.msg}); it should be one item a line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; it should be one item a line")
            found.append(row)
    return found
