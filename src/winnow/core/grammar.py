"""Writes values in Hydra's override grammar: Hydra parses `key=quoted(value)` back to the same value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[\w./:+@-]+", re.ASCII)  # characters without a meaning in the grammar
_KEYWORDS = ("null", "true", "false", "nan", "inf", "-inf", "+inf")


def quoted(value: Any) -> str:
    """Returns a value in the override grammar; text is always quoted, so that it stays text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{quoted(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(quoted(v) for v in value) + "]"
    # only backslashes before a quote are doubled
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(value)).replace("'", "\\'")
    return f"'{escaped}'"


def quoted_path(value: object) -> str:
    """Returns a path or a name, quoted only if the grammar requires it."""
    text = str(value)
    plain = (
        _PLAIN.fullmatch(text)
        and text.lower() not in _KEYWORDS
        and not re.fullmatch(r"[-+\d._e]+", text, re.IGNORECASE)
    )
    return text if plain else quoted(text)


def quoted_if_needed(value: Any) -> str:
    """Returns a value in the override grammar; text is quoted only if the grammar requires it."""
    if isinstance(value, str):
        return quoted_path(value)
    return quoted(value) if value is None or isinstance(value, Mapping | list | tuple) else str(value)
