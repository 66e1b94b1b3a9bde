"""The space of strategies: at most one method a slot, with its knobs, read from the methods themselves.

Narrowed on the command line with Hydra's own sweep grammar: `method.rtn.bits=choice(3,4)`,
`method.wanda.sparsity=interval(0.2,0.6)`, `method.lora.steps=50`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from winnow.build import target_of
from winnow.knobs import Knob, knobs_of
from winnow.types import Slot, Strategy, UserError

NONE = "none"  # the choice of no method for a slot


@dataclass(frozen=True)
class Dimension:
    """One knob to search over: `choices`, or numbers from `low` to `high`; `when` names what it depends on."""

    key: str  # method.<name>.<knob>
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)  # full key -> value

    def grid(self, points: int) -> list[Any]:
        """The choices, or `points` values spread evenly (in the logarithm, for a log scale)."""
        if self.choices:
            return list(self.choices)
        if points == 1 or self.low == self.high:
            return [self._rounded((self.low + self.high) / 2)]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        values = [low + (high - low) * i / (points - 1) for i in range(points)]
        return list(dict.fromkeys(self._rounded(math.exp(v) if self.log else v) for v in values))

    def _rounded(self, value: float) -> float | int:
        return round(value) if self.integer else float(f"{value:.6g}")


@dataclass(frozen=True)
class Method:
    name: str
    slot: Slot
    dimensions: tuple[Dimension, ...] = ()

    def defaults(self, configured: Callable[[str], Any]) -> dict[str, Any]:
        """Each knob at its configured value, or at the first choice where the space leaves that value out."""
        values = {d.key: configured(d.key) for d in self.dimensions}
        return {
            d.key: values[d.key] if not d.choices or values[d.key] in d.choices else d.choices[0]
            for d in self.dimensions
            if all(values.get(k, v) == v for k, v in d.when.items())
        }


class Suggest(Protocol):
    """What a strategy is drawn with; Optuna's `Trial` is one."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Space:
    methods: tuple[Method, ...]

    def slots(self) -> list[tuple[Slot, list[Method]]]:
        return self._slots

    def method(self, name: str) -> Method:
        return self._named[name]

    @functools.cached_property
    def _slots(self) -> list[tuple[Slot, list[Method]]]:
        ordered = sorted(self.methods, key=lambda m: m.slot)
        return [(slot, list(group)) for slot, group in itertools.groupby(ordered, key=lambda m: m.slot)]

    @functools.cached_property
    def _named(self) -> dict[str, Method]:
        return {method.name: method for method in self.methods}

    def draw(self, suggest: Suggest) -> Strategy:
        """A strategy, each choice by `suggest`; knobs of methods that are not chosen are never asked for."""
        chosen: list[str] = []
        knobs: dict[str, Any] = {}
        for slot, methods in self.slots():
            name = suggest.suggest_categorical(slot_key(slot), [NONE, *(m.name for m in methods)])
            if name == NONE:
                continue
            chosen.append(name)
            own: dict[str, Any] = {}
            for dimension in sorted(self.method(name).dimensions, key=lambda d: bool(d.when)):
                if all(own.get(key) == value for key, value in dimension.when.items() if key in own):
                    own[dimension.key] = _suggest(suggest, dimension)
            knobs |= own
        return Strategy(tuple(chosen), knobs)

    def all(self, points: int) -> Iterator[Strategy]:
        """Every strategy, numbers at `points` values each; the empty one (the base model) first."""
        per_slot = [[None, *self._variants(methods, points)] for _, methods in self.slots()]
        for combination in itertools.product(*per_slot):
            picked = [part for part in combination if part is not None]
            yield Strategy(tuple(n for n, _ in picked), {k: v for _, own in picked for k, v in own.items()})

    def _variants(self, methods: list[Method], points: int) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for method in methods:
            free = [d for d in method.dimensions if not d.when]
            bound = [d for d in method.dimensions if d.when]
            for values in itertools.product(*(d.grid(points) for d in free)):
                own = {d.key: v for d, v in zip(free, values, strict=True)}
                active = [d for d in bound if all(own.get(k, v) == v for k, v in d.when.items())]
                for more in itertools.product(*(d.grid(points) for d in active)):
                    found.append((method.name, own | {d.key: v for d, v in zip(active, more, strict=True)}))
        return found

    def size(self) -> int | None:
        """How many strategies there are; None where a knob is a range of numbers."""
        if any(not d.choices for method in self.methods for d in method.dimensions):
            return None
        return math.prod(1 + len(self._variants(group, 1)) for _, group in self.slots())

    def parameters(self, strategy: Strategy) -> dict[str, Any]:
        """The named choices that make `draw` return this strategy; knobs it does not set are left to the sampler."""
        chosen = {self.method(name).slot: name for name in strategy.methods}
        return {slot_key(slot): chosen.get(slot, NONE) for slot, _ in self.slots()} | dict(strategy.knobs)


def distributions(space: Space) -> dict[str, Any]:
    """Those that Optuna draws the parameters of strategies from, by name (`Space.parameters`)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for slot, methods in space.slots():
        found[slot_key(slot)] = CategoricalDistribution([NONE, *(m.name for m in methods)])
        for d in (d for method in methods for d in method.dimensions):
            if d.choices:
                found[d.key] = CategoricalDistribution(list(d.choices))
            elif d.integer:
                found[d.key] = IntDistribution(int(d.low), int(d.high), log=d.log)
            else:
                found[d.key] = FloatDistribution(d.low, d.high, log=d.log)
    return found


def slot_key(slot: Slot) -> str:
    return f"slot.{slot.name.lower()}"


def _suggest(suggest: Suggest, d: Dimension) -> Any:
    if d.choices:
        return suggest.suggest_categorical(d.key, list(d.choices))
    if d.integer:
        return suggest.suggest_int(d.key, int(d.low), int(d.high), log=d.log)
    return float(f"{suggest.suggest_float(d.key, d.low, d.high, log=d.log):.6g}")


def read_space(methods: Mapping[str, Mapping[str, Any]], narrowed: Mapping[str, Any]) -> Space:
    """The space over `methods` (the composed `cfg.method`), with the user's narrowings.

    Args:
        methods: by name, each with its `_target_`.
        narrowed: by full key, a value (fixed), a list (choices), or a `Knob` with `low` and `high`.

    Raises:
        UserError: a narrowing outside what the knob allows, of an unknown knob, or nothing left to search.
    """
    found, used = [], set()
    for name, node in methods.items():
        stage = target_of(node["_target_"])
        prefix = f"method.{name}."
        dimensions = []
        for knob_name, knob in knobs_of(stage).items():
            key = prefix + knob_name
            if key in narrowed:
                used.add(key)
                dimension = _narrow(key, knob, narrowed[key])
            elif knob.search:
                low, high = knob.search_range or (knob.low or 0.0, knob.high or 0.0)
                dimension = Dimension(
                    key, knob.searched or knob.choices, low, high, knob.log, isinstance(node.get(knob_name), int)
                )
            else:
                continue
            dimensions.append(replace(dimension, when={prefix + k: v for k, v in knob.when.items()}))
        fixed = {d.key: d.choices[0] for d in dimensions if len(d.choices) == 1}
        # a knob that depends on another which is fixed elsewhere can never be reached
        dimensions = [d for d in dimensions if all(fixed.get(k, v) == v for k, v in d.when.items())]
        found.append(Method(name, stage.slot, tuple(dimensions)))
    unknown = sorted(set(narrowed) - used)
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such knob in this space; see --cfg job for those there are")
    if not found:
        raise UserError(
            "the space is empty: method=[] leaves nothing to search; give some methods, e.g. method=[rtn,nf4]"
        )
    return Space(tuple(found))


def _narrow(key: str, knob: Knob, value: Any) -> Dimension:
    if isinstance(value, Knob):
        low, high = value.low or 0.0, value.high or 0.0
        if not knob.choices:
            if not (knob.allows(low) and knob.allows(high)):
                raise UserError(f"{key}=interval({low:g},{high:g}) is out of range: it takes {knob}")
            return Dimension(key, (), low, high, knob.log)
        inside = tuple(c for c in knob.choices if isinstance(c, int | float) and low <= c <= high)
        if not inside:
            raise UserError(f"{key}=interval({low:g},{high:g}) leaves nothing: it takes {knob}")
        return Dimension(key, inside)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise UserError(f"{key}: no values are left to choose from")
    for one in values:
        if not knob.allows(one):
            raise UserError(f"{key}={one} is out of range: it takes {knob}")
    return Dimension(key, tuple(values))
