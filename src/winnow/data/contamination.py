"""Detects benchmarks' test items by their hashes, so that no one calibrates or trains on them by mistake.

The folder `held_out` holds hashes, not items: the first 8 bytes of the SHA-256 of each question in lower case with normalized
white space. A question that is not specific by itself (PIQA asks "cans") is hashed together with its answer, or only the answer
is. The hashes leave out MMLU and users' own benchmarks; they cover the first 3,000 items of HellaSwag and 2,000 of LAMBADA, and
the version of WikiText-2 with `<unk>`, which shares few paragraphs with the raw one.

    python -m winnow.data.contamination FOLDER     # computes the hashes anew from a folder with the benchmarks' files
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
LEAST_CHARACTERS = 16  # shorter texts (`not True is`) are not specific to a benchmark
SPECIFIC = 32  # characters of a specific text, for benchmarks with many short questions
PARAGRAPH = 80  # characters of a specific text, for benchmarks whose texts begin alike


def _openbookqa(row: Mapping[str, Any]) -> Iterator[str]:
    answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    yield from _longer(SPECIFIC, row["question_stem"], f"{row['question_stem']} {answer}")


def _piqa(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _longer(SPECIFIC, row["goal"], row["sol1"], row["sol2"])


def _winogrande(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["sentence"]
    yield row["sentence"].replace("_", row[f"option{row['answer']}"])


def _hellaswag(row: Mapping[str, Any]) -> Iterator[str]:
    """Yields the prompt, the text with the right ending, and the longest wrong ending, which a machine wrote."""
    right = row["endings"][int(row["label"])]
    yield from _longer(PARAGRAPH, f"{row['activity_label']}: {row['ctx']}", f"{row['ctx']} {right}")
    yield from _longer(SPECIFIC, max((ending for ending in row["endings"] if ending != right), key=len))


def _lambada(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["text"]
    yield row["text"].rpartition(" ")[0]


def _wikitext(row: Mapping[str, Any]) -> Iterator[str]:
    yield from _longer(PARAGRAPH, *row["page"].split("\n"))


def _longer(minimum: int, *texts: str) -> Iterator[str]:
    return (text for text in texts if len(text) >= minimum)


# by benchmark: file pattern below the folder of benchmarks, and the question field or a function that gives the texts of a row
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
    """Returns the hash of a question, independent of case and spacing; None for a question that is too short."""
    normalized = " ".join(text.casefold().split())
    return hashlib.sha256(normalized.encode()).digest()[:HASH_BYTES] if len(normalized) >= LEAST_CHARACTERS else None


def benchmark_of(text: str) -> str | None:
    """Returns the benchmark with a test question equal to this text, or to one of its paragraphs or lines; else None."""
    parts = {text, *text.split("\n\n"), *text.splitlines()}
    for part in {_LABEL.sub("", part) for part in parts}:
        benchmark = _benchmarks_by_hash().get(digest(part) or b"")
        if benchmark is not None:
            return benchmark
    return None


@functools.cache
def _benchmarks_by_hash() -> dict[bytes, str]:
    benchmarks = {}
    for path in sorted(FOLDER.glob("*.bin")):
        data = path.read_bytes()
        benchmarks.update({data[i : i + HASH_BYTES]: path.stem for i in range(0, len(data), HASH_BYTES)})
    for name, text in _nano_questions():
        key = digest(text)
        if key is not None:
            benchmarks[key] = name
    return benchmarks


def _nano_questions() -> Iterator[tuple[str, str]]:
    """Yields (benchmark, question) of the nano benchmarks, whose items are in the package."""
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
        hashes = sorted({key for row_texts in texts for text in row_texts if (key := digest(text)) is not None})
        (FOLDER / f"{name}.bin").write_bytes(b"".join(hashes))
        print(f"{name}: {len(hashes)} hashes for {sum(map(bool, texts))} of {len(rows)} items")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
