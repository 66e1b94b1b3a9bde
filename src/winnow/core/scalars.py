"""Validates config values against their type annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from winnow.core.errors import UserError

TYPE_DESCRIPTIONS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text (a number in quotes: \"'3'\")",
    "None": "null",
}


def check_scalars(target: Callable[..., Any], values: Mapping[Any, Any], where: str = "") -> None:
    """Checks values against the annotations of the callable that takes them; only types in `TYPE_DESCRIPTIONS` are checked.

    Args:
        target: a dataclass or a function.
        where: the config key that holds the values.

    Raises:
        UserError: a value is of another type.
    """
    for name, parameter in inspect.signature(target).parameters.items():
        types = [part.strip() for part in str(parameter.annotation).split("|")]
        if (
            name in values
            and set(types) <= set(TYPE_DESCRIPTIONS)
            and not any(_fits(values[name], expected) for expected in types)
        ):
            key = f"{where}.{name}" if where else name
            raise UserError(
                f"{key}={values[name]} is of the wrong type; give {' or '.join(TYPE_DESCRIPTIONS[n] for n in types)}"
            )


def _fits(value: Any, name: str) -> bool:
    if isinstance(value, bool) or name == "bool":
        return isinstance(value, bool) and name == "bool"
    if name == "None":
        return value is None
    if name == "str":
        return isinstance(value, str)
    return isinstance(value, int) or (isinstance(value, float) and (name == "float" or value.is_integer()))
