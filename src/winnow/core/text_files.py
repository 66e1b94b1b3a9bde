"""The text files that people have: rows of JSON, or plain text. Whatever is wrong with one is named by file and line.

What is harmless is read: a byte order mark, UTF-16 as Windows writes it, an array instead of a row a line, suffixes in capitals.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError

ROWS, TEXT = (".jsonl", ".ndjson", ".json"), (".txt",)
SUFFIXES = (*ROWS, *TEXT)
KINDS = "a .jsonl, .json or .txt file"


def is_readable(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def holds_rows(path: Path) -> bool:
    """Whether a file is of rows, and not of plain text."""
    return path.suffix.lower() in ROWS


def text_of(path: Path) -> str:
    """The whole text of a file.

    Raises:
        UserError: it is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: it is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file, an object with fields, and where it stands, for messages.

    Raises:
        UserError: a row that is no JSON, no object, or holds text that is no Unicode.
    """
    text = text_of(path)
    if text.lstrip().startswith("["):
        found: Any = _parsed(text, f"{path}")
        numbered = ((f"{path}, item {number}", row) for number, row in enumerate(found, 1))
    else:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        numbered = ((where, _parsed(line, where)) for where, line in lines if line.strip())
    for where, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f'{where}: it is no JSON object with fields, as {{"text": "..."}}')
        for part in strings_in(row):
            _check_unicode(part, where)
        yield where, row


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a row, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(part)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{where}: it is not JSON ({error}); there should be one object a line, or one array"
        ) from error


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where}: {lone} is half of a character (a lone surrogate); remove it, or write both halves"
        ) from error
