"""Settings of the wrong type are named before they get anywhere; those that may be anything are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from winnow.core.errors import UserError
from winnow.core.scalars import check_scalars


@dataclass
class Settings:
    count: int = 1
    share: float | None = None
    on: bool = False
    name: str = ""
    either: int | str = 1
    parts: list[int] | None = None
    inner: Any = None


@pytest.mark.parametrize(
    "values",
    [
        {"count": 3, "share": 1, "on": True, "name": "3", "either": "auto"},
        {"count": 3.0, "share": 0.5},  # as 3e0 is read
        {"share": None, "parts": "what the class says of it", "inner": 7, "unknown": "that is for the class to refuse"},
    ],
)
def test_what_fits_is_let_through(values: dict[str, Any]) -> None:
    check_scalars(Settings, values, "agent")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "many"}, r"^agent\.count=many is of the wrong type; give a whole number$"),
        ({"count": 2.5}, "a whole number"),
        ({"count": True}, "a whole number"),
        ({"count": None}, "a whole number"),
        ({"share": "half"}, "a number or null"),
        ({"share": float}, "a number or null"),
        ({"on": 1}, "true or false"),
        ({"name": 3}, "text"),
        ({"either": 2.5}, "a whole number or text"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_scalars(Settings, values, "agent")


def test_functions_have_types_too() -> None:
    def made(path: str | None, bits: int = 4) -> None: ...

    check_scalars(made, {"path": None, "bits": 3})
    with pytest.raises(UserError, match=r"^path=3 is of the wrong type; give text .* or null$"):
        check_scalars(made, {"path": 3})
