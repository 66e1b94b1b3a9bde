"""Reads the JSON of an answer, also where a model has put it into prose; and keeps keys out of every text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

MOST_BYTES = 64 * 1024  # of an answer; no proposal needs as much
MOST_STARTS = 200  # places in a text at which JSON may begin
_KEYS = re.compile(r"\b(?:sk|pk|key|gsk|xai)-[\w-]{8,}|\bAIza[\w-]{20,}|(?<=[Bb]earer )\S{8,}")


class Unusable(Exception):
    """An answer came that cannot be used; the message says to the model what is wrong with it."""


def json_of(text: str, wanted: Sequence[str]) -> Any:
    """The object in a text that has one of the `wanted` keys; the first value that is JSON where none has.

    Raises:
        Unusable: there is none, or the text is too long to be an answer.
    """
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise Unusable(f"The answer is longer than {MOST_BYTES // 1024} kB; give nothing but the JSON object.")
    if not text.strip():
        raise Unusable("The answer is empty; give the JSON object.")
    found = []
    try:
        found.append(json.loads(text))
    except (ValueError, RecursionError):
        found += _inside(text)
    for value in found:
        if isinstance(value, dict) and any(key in value for key in wanted):
            return value
    if found:
        return found[0]
    raise Unusable("The answer holds no JSON object; give it and nothing else.")


def _inside(text: str) -> list[Any]:
    decoder, found, place = json.JSONDecoder(), [], 0
    for _ in range(MOST_STARTS):
        match = re.compile(r"[{\[]").search(text, place)
        if match is None:
            break
        try:
            value, place = decoder.raw_decode(text, match.start())
            found.append(value)
        except (ValueError, RecursionError):
            place = match.start() + 1
    return found


def scrub(value: Any, secret: str = "") -> Any:
    """The same text, or JSON of texts, without the secret and anything else that looks like a key."""
    if isinstance(value, dict):
        return {key: scrub(inner, secret) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(inner, secret) for inner in value]
    if not isinstance(value, str):
        return value
    if secret:
        value = value.replace(secret, "***")
    return _KEYS.sub("***", value)
