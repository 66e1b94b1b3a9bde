"""Reads users' text files, either rows of JSON or plain text, and names the file and line of each error.

Harmless variants are accepted: a byte order mark, UTF-16 as Windows writes it, a JSON array instead of one row per line, and
suffixes in capitals.
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
    """Returns whether `path` is a file with one of the suffixes that winnow reads."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def is_rows_file(path: Path) -> bool:
    """Returns whether a file holds JSON rows rather than plain text."""
    return path.suffix.lower() in ROWS


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        UserError: the file is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: it is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location of each row of a file, for messages, and the row itself, a JSON object.

    Raises:
        UserError: a row is not JSON, not an object, or holds invalid Unicode.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        items: Any = _parse_json(text, f"{path}")
        located_rows = ((f"{path}, item {number}", row) for number, row in enumerate(items, 1))
    else:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        located_rows = ((where, _parse_json(line, where)) for where, line in lines if line.strip())
    for where, row in located_rows:
        if not isinstance(row, dict):
            raise UserError(f'{where}: it is no JSON object with fields, as {{"text": "..."}}')
        for part in strings_in(row):
            _check_unicode(part, where)
        yield where, row


def strings_in(value: Any) -> Iterator[str]:
    """Yields all strings in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(part)


def _parse_json(text: str, where: str) -> Any:
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
