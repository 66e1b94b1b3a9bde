"""Reads the JSON of a model's answer, even inside prose, and removes API keys from texts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

MOST_BYTES = 64 * 1024  # longest answer; no proposal needs as much
MOST_STARTS = 200  # places in a text at which JSON may begin
_KEYS = re.compile(r"\b(?:sk|pk|key|gsk|xai)-[\w-]{8,}|\bAIza[\w-]{20,}|(?<=[Bb]earer )\S{8,}")


class Unusable(Exception):
    """Raised for an answer that cannot be used; the message tells the model what is wrong with it."""


def json_of(text: str, expected_keys: Sequence[str]) -> Any:
    """Returns the JSON object in a text that has one of the expected keys, else the first JSON value.

    Raises:
        Unusable: the text holds no JSON, or is too long to be an answer.
    """
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise Unusable(f"The answer is longer than {MOST_BYTES // 1024} kB; give nothing but the JSON object.")
    if not text.strip():
        raise Unusable("The answer is empty; give the JSON object.")
    values = []
    try:
        values.append(json.loads(text))
    except (ValueError, RecursionError):
        values += _embedded_values(text)
    for value in values:
        if isinstance(value, dict) and any(key in value for key in expected_keys):
            return value
    if values:
        return values[0]
    raise Unusable("The answer holds no JSON object; give it and nothing else.")


def _embedded_values(text: str) -> list[Any]:
    """Returns the JSON objects and arrays inside a text."""
    decoder, values, place = json.JSONDecoder(), [], 0
    for _ in range(MOST_STARTS):
        match = re.compile(r"[{\[]").search(text, place)
        if match is None:
            break
        try:
            value, place = decoder.raw_decode(text, match.start())
            values.append(value)
        except (ValueError, RecursionError):
            place = match.start() + 1
    return values


def scrub(value: Any, secret: str = "") -> Any:
    """Returns a text, or JSON of texts, without the secret and anything else that looks like a key."""
    if isinstance(value, dict):
        return {key: scrub(inner, secret) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(inner, secret) for inner in value]
    if not isinstance(value, str):
        return value
    if secret:
        value = value.replace(secret, "***")
    return _KEYS.sub("***", value)
