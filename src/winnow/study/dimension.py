"""One knob to search over: which values it has, which of them is nearest to another one, and how a user narrows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from winnow.core.errors import UserError
from winnow.method.knobs import Knob, is_number, same


class Suggest(Protocol):
    """What a strategy is drawn with; Optuna's `Trial` is one."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """One knob to search over: `choices`, or numbers from `low` to `high`; `when` names what it depends on.

    Attributes:
        knob: what the method itself allows, searched over or not.
    """

    key: str  # method.<name>.<knob>
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)  # full key -> value
    knob: Knob = field(default_factory=Knob)

    def holds(self, value: Any) -> bool:
        """Whether the value is searched over."""
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        whole = is_number(value) and (not self.integer or float(value).is_integer())
        return whole and self.low <= value <= self.high

    def nearest(self, value: Any) -> Any:
        """The value as the space has it; for one outside, the nearest number, or the first choice where none is near."""
        if not self.choices:
            return self.rounded(value if is_number(value) else self.low)
        equal = [choice for choice in self.choices if same(value, choice)]
        numbers = [choice for choice in self.choices if is_number(choice)]
        if equal or not numbers or not is_number(value):
            return [*equal, self.choices[0]][0]
        return min(numbers, key=lambda choice: abs(choice - value))

    def rounded(self, value: float) -> float | int:
        """A number with the digits that the space has, within the range."""
        inside = min(self.high, max(self.low, value))
        if self.integer:
            return round(inside)
        return float(min(self.high, max(self.low, float(f"{inside:.6g}"))))

    def grid(self, points: int) -> list[Any]:
        """The choices, or `points` values spread evenly (in the logarithm, for a log scale)."""
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
        """The one that Optuna draws its values from."""
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


def searched(key: str, knob: Knob) -> Dimension:
    """All of a knob that is searched over unless a user says otherwise."""
    low, high = knob.search_range or (knob.low or 0.0, knob.high or 0.0)
    return _ranging(key, knob, low, high) if not knob.choices else _choosing(key, knob, knob.searched or knob.choices)


def narrowed(key: str, knob: Knob, value: Any) -> Dimension:
    """A knob as a user narrows it.

    Args:
        value: a fixed value; or a `Knob` with choices, or with `low` and `high`.

    Raises:
        UserError: it leaves nothing, or goes beyond what the knob allows.
    """
    if isinstance(value, list | tuple):
        words = ",".join(map(str, value))
        raise UserError(f"{key}=[{words}]: a knob takes one value; search over several with {key}=choice({words})")
    if not isinstance(value, Knob) or value.choices:
        values = value.choices if isinstance(value, Knob) else (value,)
        for one in values:
            if not knob.allows(one):
                raise UserError(f"{key}={one} is out of range: it takes {knob.described}")
        return _choosing(key, knob, values)
    low, high = value.low or 0.0, value.high or 0.0
    given = f"{key}=interval({low:g},{high:g})"
    if knob.choices:
        inside = [c for c in knob.choices if is_number(c) and low <= c <= high]
        if not inside:
            raise UserError(f"{given} leaves nothing: it takes {knob.described}")
        return _choosing(key, knob, inside)
    if low > high:
        raise UserError(f"{given} leaves nothing: its first number is the larger one; write interval({high:g},{low:g})")
    if knob.integer:
        first, last = math.ceil(low), math.floor(high)
        if first > last:
            raise UserError(f"{given} leaves nothing: it takes {knob.described}")
        low, high = first, last
    ends = replace(knob, integer=False)
    if not (ends.allows(low) and ends.allows(high)):
        raise UserError(f"{given} is out of range: it takes {knob.described}")
    return _ranging(key, knob, low, high)


def _ranging(key: str, knob: Knob, low: float, high: float) -> Dimension:
    return Dimension(key, (), low, high, knob.log, knob.integer, knob=knob)


def _choosing(key: str, knob: Knob, values: Sequence[Any]) -> Dimension:
    """Each value once, in the order of the knob's own choices, or of numbers: however they were typed, the space is the same."""
    if knob.choices:
        chosen = [choice for choice in knob.choices if any(same(choice, value) for value in values)]
    else:
        chosen = sorted({int(value) if knob.integer else value for value in values})
    return Dimension(key, tuple(chosen), knob=knob)
