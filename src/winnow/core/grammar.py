"""Values in Hydra's grammar of overrides: whatever text there is, `key=text_of(value)` gives it back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[\w./:+@-]+", re.ASCII)  # of letters that mean nothing to Hydra
_WORDS = ("null", "true", "false", "nan", "inf", "-inf", "+inf")


def text_of(value: Any) -> str:
    """A value as it must be written; text is always quoted, so that it stays text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(text_of(v) for v in value) + "]"
    # backslashes double before a quote only
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(value)).replace("'", "\\'")
    return f"'{escaped}'"


def path(value: object) -> str:
    """A path or a name, quoted where it must be: most need not."""
    text = str(value)
    plain = (
        _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not re.fullmatch(r"[-+\d._e]+", text, re.IGNORECASE)
    )
    return text if plain else text_of(text)


def short(value: Any) -> str:
    """A value as it must be written, its text quoted only where it must be."""
    if isinstance(value, str):
        return path(value)
    return text_of(value) if value is None or isinstance(value, Mapping | list | tuple) else str(value)
