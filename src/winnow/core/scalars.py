"""Whether settings are of the types that they are declared with: a word where a number belongs is named, and goes no further."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from winnow.core.errors import UserError

NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text (a number in quotes: \"'3'\")",
    "None": "null",
}


def check_scalars(target: Callable[..., Any], values: Mapping[Any, Any], where: str = "") -> None:
    """Compares values with the annotations of what they will be passed to, as far as those are made of `NAMES`.

    Args:
        target: a dataclass or a function.
        where: the key under which the values are found.

    Raises:
        UserError: one is of another type.
    """
    for name, parameter in inspect.signature(target).parameters.items():
        wanted = [part.strip() for part in str(parameter.annotation).split("|")]
        if name in values and set(wanted) <= set(NAMES) and not any(_fits(values[name], one) for one in wanted):
            key = f"{where}.{name}" if where else name
            raise UserError(f"{key}={values[name]} is of the wrong type; give {' or '.join(NAMES[n] for n in wanted)}")


def _fits(value: Any, name: str) -> bool:
    if isinstance(value, bool) or name == "bool":
        return isinstance(value, bool) and name == "bool"
    if name == "None":
        return value is None
    if name == "str":
        return isinstance(value, str)
    return isinstance(value, int) or (isinstance(value, float) and (name == "float" or value.is_integer()))
