"""Writes the test sets of the nano benchmarks as JSONL, one item a line, beside the tasks that read them.

Each row holds the columns of the benchmark that the family imitates, and `prompt`: what the model is shown, character
for character as the embedded model was trained on it.

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
    """The rows of `<name>.jsonl`: a family's test set, or the held-out text."""
    if name == TEXT:
        return [{"text": item.completion} for item in held_out_text()]
    return [{"prompt": item.prompt} | item.row for item in benchmark_items(name)]


def render(name: str) -> str:
    """The content of `<name>.jsonl`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name))


def write(folder: Path = DATA) -> list[Path]:
    """Writes all files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in (*FAMILIES, TEXT):
        path = folder / f"{name}.jsonl"
        path.write_text(render(name), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write():
        print(written)
