"""Knows the test items of the benchmarks by their hashes, so that nobody calibrates or trains on them by mistake.

Beside this file lie the hashes, not the items: the first 8 bytes of the SHA-256 of each question in lower case, its
white space evened out. MMLU's and users' own benchmarks are not among them.

    python -m winnow.benchmark.held_out FOLDER     # makes them anew from a folder with the benchmarks' files
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("held_out")
HASH_BYTES = 8
LEAST_CHARACTERS = 16  # shorter texts (`not True is`) are nobody's in particular
# where the questions are: file pattern below the folder of benchmarks, and their field
QUESTIONS = {
    "gsm8k": ("gsm8k/test.jsonl", "question"),
    "commonsense_qa": ("commonsense_qa/validation.jsonl", "question"),
    "truthfulqa": ("truthful_qa/validation.jsonl", "question"),
    "humaneval": ("openai_humaneval/test.jsonl", "prompt"),
    "bbh": ("bbh/*.jsonl", "input"),
}
_LABEL = re.compile(r"^\s*(question|q|problem|input|prompt)\s*:\s*", re.IGNORECASE)


def digest(text: str) -> bytes | None:
    """The hash of a question, whatever its case and spacing; None for one too short to tell."""
    bare = " ".join(text.casefold().split())
    return hashlib.sha256(bare.encode()).digest()[:HASH_BYTES] if len(bare) >= LEAST_CHARACTERS else None


def benchmark_of(text: str) -> str | None:
    """The benchmark one of whose test questions is this text, or one of its paragraphs or lines."""
    parts = {text, *text.split("\n\n"), *text.splitlines()}
    for part in {_LABEL.sub("", part) for part in parts}:
        found = _known().get(digest(part) or b"")
        if found is not None:
            return found
    return None


@functools.cache
def _known() -> dict[bytes, str]:
    known = {}
    for path in sorted(FOLDER.glob("*.bin")):
        data = path.read_bytes()
        known.update({data[i : i + HASH_BYTES]: path.stem for i in range(0, len(data), HASH_BYTES)})
    for name, text in _nano():
        key = digest(text)
        if key is not None:
            known[key] = name
    return known


def _nano() -> Iterator[tuple[str, str]]:
    """The embedded benchmarks' questions: their items lie in the package."""
    from winnow.nano.datasets import DATA

    for path in sorted(DATA.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield path.stem, next(row[field] for field in ("question", "input", "prompt", "text") if field in row)


def write(source: Path) -> None:
    """Writes `held_out/<benchmark>.bin` for all benchmarks from their files below `source`."""
    FOLDER.mkdir(exist_ok=True)
    for name, (pattern, field) in QUESTIONS.items():
        rows = [json.loads(line) for path in sorted(source.glob(pattern)) for line in path.open(encoding="utf-8")]
        hashes = sorted({key for row in rows if (key := digest(row[field])) is not None})
        (FOLDER / f"{name}.bin").write_bytes(b"".join(hashes))
        print(f"{name}: {len(hashes)} of {len(rows)} items")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
