"""Knows the test items of the benchmarks by their hashes, so that nobody calibrates or trains on them by mistake.

Beside this file lie the hashes, not the items: the first 8 bytes of the SHA-256 of each question in lower case, its
white space evened out. Where a question by itself is nobody's in particular (PIQA asks "cans"), it is the question with its
answer, or the answer. MMLU's and users' own benchmarks are not among them, of HellaSwag and LAMBADA only the first 3,000 and
2,000 items, and of WikiText-2 the version with `<unk>`, which shares few paragraphs with the raw one.

    python -m winnow.data.contamination FOLDER     # makes them anew from a folder with the benchmarks' files
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("held_out")
HASH_BYTES = 8
LEAST_CHARACTERS = 16  # shorter texts (`not True is`) are nobody's in particular
SPECIFIC = 32  # characters of a text that is nobody else's, where items are many and their questions short
PARAGRAPH = 80  # of one that begins as others do


def _openbookqa(row: Mapping[str, Any]) -> Iterator[str]:
    answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    yield from _longer(SPECIFIC, row["question_stem"], f"{row['question_stem']} {answer}")


def _piqa(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _longer(SPECIFIC, row["goal"], row["sol1"], row["sol2"])


def _winogrande(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["sentence"]
    yield row["sentence"].replace("_", row[f"option{row['answer']}"])


def _hellaswag(row: Mapping[str, Any]) -> Iterator[str]:
    """The prompt, the text that is right, and the longest ending that is wrong, which a machine wrote."""
    right = row["endings"][int(row["label"])]
    yield from _longer(PARAGRAPH, f"{row['activity_label']}: {row['ctx']}", f"{row['ctx']} {right}")
    yield from _longer(SPECIFIC, max((ending for ending in row["endings"] if ending != right), key=len))


def _lambada(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["text"]
    yield row["text"].rpartition(" ")[0]


def _wikitext(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _longer(PARAGRAPH, *row["page"].split("\n"))


def _longer(least: int, *texts: str) -> Iterator[str]:
    return (text for text in texts if len(text) >= least)


# where the questions are: file pattern below the folder of benchmarks, and their field or what gives them of a row
QUESTIONS: dict[str, tuple[str, str | Callable[[Mapping[str, Any]], Iterator[str]]]] = {
    "gsm8k": ("gsm8k/test.jsonl", "question"),
    "commonsense_qa": ("commonsense_qa/validation.jsonl", "question"),
    "truthfulqa": ("truthful_qa/validation.jsonl", "question"),
    "humaneval": ("openai_humaneval/test.jsonl", "prompt"),
    "bbh": ("bbh/*.jsonl", "input"),
    "arc_easy": ("arc_easy/test.jsonl", "question"),
    "arc_challenge": ("arc_challenge/test.jsonl", "question"),
    "openbookqa": ("openbookqa/test.jsonl", _openbookqa),
    "piqa": ("piqa/validation.jsonl", _piqa),
    "winogrande": ("winogrande/validation.jsonl", _winogrande),
    "hellaswag": ("hellaswag/validation.jsonl", _hellaswag),
    "lambada": ("lambada_openai/test.jsonl", _lambada),
    "wikitext": ("wikitext2/test.jsonl", _wikitext),
}
_LABEL = re.compile(r"^\s*(question|q|problem|input|prompt|goal|answer|a)\s*:\s*", re.IGNORECASE)


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
        texts = [[row[field]] if isinstance(field, str) else list(field(row)) for row in rows]
        hashes = sorted({key for of_one in texts for text in of_one if (key := digest(text)) is not None})
        (FOLDER / f"{name}.bin").write_bytes(b"".join(hashes))
        print(f"{name}: {len(hashes)} hashes for {sum(map(bool, texts))} of {len(rows)} items")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
