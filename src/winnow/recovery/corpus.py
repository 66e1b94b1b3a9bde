"""Training documents by name: the nano world's endless stream, or a JSONL or text file. Never a benchmark's test items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from winnow.types import Document, UserError

TEXT_FIELDS = ("text", "content")
PAIRS = (("prompt", "completion"), ("question", "answer"))


def check_source(source: str) -> None:
    """Raises UserError if there is no such source."""
    if source != "nano" and not Path(source).is_file():
        raise UserError(f"calibration.source={source}: no such file; give `nano`, or the path of a .jsonl or .txt file")


def training_documents(source: str, seed: int | None = None) -> Iterator[Document]:
    """The documents of `source`: `nano` (endless), or those of a `.jsonl` or `.txt` file, once.

    A JSONL row is a prompt with its completion (`prompt`/`completion`, or `question`/`answer`), or plain `text`.

    Raises:
        UserError: the file is missing, or a row has none of the fields (the message lists those it has).
    """
    if source == "nano":
        from winnow.nano.items import TRAIN_SEED, training_items

        for item in training_items(TRAIN_SEED if seed is None else seed):
            yield Document(item.prompt, item.completion)
        return
    check_source(source)
    path = Path(source)
    with path.open(encoding="utf-8") as lines:
        if path.suffix == ".txt":
            for paragraph in lines.read().split("\n\n"):
                if paragraph.strip():
                    yield Document("", paragraph.strip())
            return
        for number, line in enumerate(lines, 1):
            yield _document(json.loads(line), source, number)


def _document(row: dict[str, str], source: str, number: int) -> Document:
    for field in TEXT_FIELDS:
        if field in row:
            return Document("", row[field])
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            if prompt == "question":
                return Document(f"Question: {row[prompt]}\nAnswer:", f" {row[completion]}")
            return Document(row[prompt], row[completion])
    raise UserError(
        f"calibration.source={source}, line {number}: no text in it; it has the fields {', '.join(row)}, "
        f"wanted: text, or prompt and completion, or question and answer"
    )
