"""Writes the test sets of the nano benchmarks as JSONL, one item per line, next to the tasks that read them.

Each row holds the columns of the benchmark that the family imitates, and `prompt`: the model's input, character for character
as in the training of the embedded model.

    python -m winnow.nano.datasets            # rewrites src/winnow/nano/data; the same bytes on any machine
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from winnow.nano.items import FAMILIES, benchmark_items, held_out_text

DATA = Path(__file__).parent / "data"
TEXT = "nano_text"


def rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of `<name>.jsonl`: a family's test set, or the held-out text."""
    if name == TEXT:
        return [{"text": item.completion} for item in held_out_text()]
    return [{"prompt": item.prompt} | item.row for item in benchmark_items(name)]


def render(name: str) -> str:
    """Returns the content of `<name>.jsonl`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name))


def write(folder: Path = DATA) -> list[Path]:
    """Writes all files and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in (*FAMILIES, TEXT):
        path = folder / f"{name}.jsonl"
        path.write_text(render(name), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for path in write():
        print(path)
