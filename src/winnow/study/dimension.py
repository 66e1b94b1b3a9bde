"""Defines one dimension of the search space: the values of a knob, the nearest one to a given value, and its narrowing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from winnow.core.errors import UserError
from winnow.method.knobs import Knob, is_number, same


class Suggest(Protocol):
    """Draws the values of a strategy's parameters; Optuna's `Trial` has this interface."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """One knob to search over: `choices`, or numbers from `low` to `high`; `when` names the values that it depends on.

    Attributes:
        knob: all values that the method itself allows.
    """

    key: str  # method.<name>.<knob>
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)  # full key -> value
    knob: Knob = field(default_factory=Knob)

    def contains(self, value: Any) -> bool:
        """Returns True if the value is searched over."""
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        valid_number = is_number(value) and (not self.integer or float(value).is_integer())
        return valid_number and self.low <= value <= self.high

    def nearest(self, value: Any) -> Any:
        """Returns the equal value in the space, else the nearest number, else the first choice."""
        if not self.choices:
            return self.rounded(value if is_number(value) else self.low)
        equal = [choice for choice in self.choices if same(value, choice)]
        numbers = [choice for choice in self.choices if is_number(choice)]
        if equal or not numbers or not is_number(value):
            return [*equal, self.choices[0]][0]
        return min(numbers, key=lambda choice: abs(choice - value))

    def rounded(self, value: float) -> float | int:
        """Returns the number clipped to the range, with 6 significant digits or as an integer."""
        inside = min(self.high, max(self.low, value))
        if self.integer:
            return round(inside)
        return float(min(self.high, max(self.low, float(f"{inside:.6g}"))))

    def grid(self, points: int) -> list[Any]:
        """Returns the choices, or `points` evenly spaced values (in the logarithm, for a log scale)."""
        if self.choices:
            return list(self.choices)
        if points == 1 or self.low == self.high:
            return [self.rounded((self.low + self.high) / 2)]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        values = [low + (high - low) * i / (points - 1) for i in range(points)]
        return list(dict.fromkeys(self.rounded(math.exp(v) if self.log else v) for v in values))

    def draw(self, suggest: Suggest) -> Any:
        if self.choices:
            return suggest.suggest_categorical(self.key, list(self.choices))
        if self.integer:
            return suggest.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return self.rounded(suggest.suggest_float(self.key, self.low, self.high, log=self.log))

    def distribution(self) -> Any:
        """Returns the Optuna distribution of the values."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(list(self.choices))
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{'whole numbers ' if self.integer else ''}from {self.low:g} to {self.high:g}"


def default_dimension(key: str, knob: Knob) -> Dimension:
    """Returns the dimension of a knob that no user has narrowed."""
    low, high = knob.search_range or (knob.low or 0.0, knob.high or 0.0)
    return _range(key, knob, low, high) if not knob.choices else _choices(key, knob, knob.searched or knob.choices)


def narrowed_dimension(key: str, knob: Knob, value: Any) -> Dimension:
    """Returns the dimension of a knob that a user has narrowed.

    Args:
        value: a fixed value; or a `Knob` with choices, or with `low` and `high`.

    Raises:
        UserError: the narrowing leaves nothing, or exceeds what the knob allows.
    """
    if isinstance(value, list | tuple):
        words = ",".join(map(str, value))
        raise UserError(f"{key}=[{words}]: a knob takes one value; search over several with {key}=choice({words})")
    if not isinstance(value, Knob) or value.choices:
        values = value.choices if isinstance(value, Knob) else (value,)
        for choice in values:
            if not knob.allows(choice):
                raise UserError(f"{key}={choice} is out of range: it takes {knob.allowed_values}")
        return _choices(key, knob, values)
    low, high = value.low or 0.0, value.high or 0.0
    interval = f"{key}=interval({low:g},{high:g})"
    if knob.choices:
        inside = [c for c in knob.choices if is_number(c) and low <= c <= high]
        if not inside:
            raise UserError(f"{interval} leaves nothing: it takes {knob.allowed_values}")
        return _choices(key, knob, inside)
    if low > high:
        raise UserError(
            f"{interval} leaves nothing: its first number is the larger one; write interval({high:g},{low:g})"
        )
    if knob.integer:
        first, last = math.ceil(low), math.floor(high)
        if first > last:
            raise UserError(f"{interval} leaves nothing: it takes {knob.allowed_values}")
        low, high = first, last
    real_valued = replace(knob, integer=False)
    if not (real_valued.allows(low) and real_valued.allows(high)):
        raise UserError(f"{interval} is out of range: it takes {knob.allowed_values}")
    return _range(key, knob, low, high)


def _range(key: str, knob: Knob, low: float, high: float) -> Dimension:
    return Dimension(key, (), low, high, knob.log, knob.integer, knob=knob)


def _choices(key: str, knob: Knob, values: Sequence[Any]) -> Dimension:
    """Returns a dimension of distinct choices, in the order of the knob's own choices, or sorted: equal sets give equal spaces."""
    if knob.choices:
        choices = [choice for choice in knob.choices if any(same(choice, value) for value in values)]
    else:
        choices = sorted({int(value) if knob.integer else value for value in values})
    return Dimension(key, tuple(choices), knob=knob)
