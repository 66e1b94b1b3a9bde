"""The space of strategies: at most one method a slot, with its knobs, read from the methods themselves.

Narrowed on the command line with Hydra's own sweep grammar: `method.rtn.bits=choice(3,4)`,
`method.wanda.sparsity=interval(0.2,0.6)`, `method.lora.steps=50`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from winnow.core import grammar
from winnow.core.errors import UserError
from winnow.core.targets import target_of
from winnow.core.types import Slot, Strategy
from winnow.method.knobs import Knob, knobs_of, same
from winnow.study.dimension import Dimension, Suggest, narrowed, searched

NONE = "none"  # the choice of no method for a slot


@dataclass(frozen=True)
class Method:
    """A method of the space.

    Attributes:
        fixed: settings that every strategy with the method has, by full key: those that are not searched over and are not the
            method's own defaults.
        idle: by full key, what a knob must be where it does not count.
    """

    name: str
    slot: Slot
    dimensions: tuple[Dimension, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    idle: Mapping[str, Any] = field(default_factory=dict)

    def counting(self, values: Mapping[str, Any]) -> list[Dimension]:
        """The knobs that count, given the values of others by full key."""
        return [d for d in self.dimensions if all(same(values.get(k, v), v) for k, v in d.when.items())]

    def knobs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of a strategy with the method: of `values` those that count, and what is the same in all strategies."""
        count = {d.key for d in self.counting(values)}
        idle = {key: value for key, value in self.idle.items() if key not in count}
        return {key: value for key, value in values.items() if key in count} | idle | dict(self.fixed)

    def defaults(self, configured: Callable[[str], Any]) -> dict[str, Any]:
        """Each knob at its configured value, or where the space leaves that out at the nearest one that it has."""
        return self.knobs({d.key: d.nearest(configured(d.key)) for d in self.dimensions})


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
            method = self.method(name)
            own = {d.key: d.draw(suggest) for d in method.dimensions if not d.when}
            own |= {d.key: d.draw(suggest) for d in method.counting(own) if d.when}
            knobs |= method.knobs(own)
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
            for values in itertools.product(*(d.grid(points) for d in free)):
                own = {d.key: v for d, v in zip(free, values, strict=True)}
                active = [d for d in method.counting(own) if d.when]
                for more in itertools.product(*(d.grid(points) for d in active)):
                    knobs = own | {d.key: v for d, v in zip(active, more, strict=True)}
                    found.append((method.name, method.knobs(knobs)))
        return found

    def size(self) -> int | None:
        """How many strategies there are; None where a knob is a range of numbers."""
        if any(not d.choices for method in self.methods for d in method.dimensions):
            return None
        return math.prod(1 + len(self._variants(group, 1)) for _, group in self.slots())

    def parameters(self, strategy: Strategy) -> dict[str, Any]:
        """The named choices that make `draw` return this strategy; what it does not set, or the space has not, is left out."""
        known = [self._named[name] for name in strategy.methods if name in self._named]
        chosen = {slot_key(method.slot): method.name for method in known}
        if len(known) == len(strategy.methods):
            chosen = {slot_key(slot): NONE for slot, _ in self.slots()} | chosen
        counting = {d.key: d for method in known for d in method.counting(strategy.knobs)}
        return chosen | {k: v for k, v in strategy.knobs.items() if k in counting and counting[k].holds(v)}

    def objection(self, strategy: Strategy) -> str:
        """Why a strategy cannot be tried in this space; empty where it can. Settings that are not searched over are its own."""
        missing = [name for name in strategy.methods if name not in self._named]
        if missing:
            return f"method {missing[0]} is not searched over"
        methods = [self._named[name] for name in strategy.methods]
        slots = [method.slot for method in methods]
        if slots != sorted(set(slots)):
            return "its methods are not one a slot in the order of slots"
        for method in methods:
            for d in method.counting(strategy.knobs):
                if d.key in strategy.knobs and not d.holds(strategy.knobs[d.key]):
                    return f"{d.key}={strategy.knobs[d.key]} is not searched over, only {d}"
            for key, value in method.fixed.items():
                if strategy.knobs.get(key) != value:
                    return f"{key} is not {value}, as it is in all of this space"
        return ""

    def holds(self, strategy: Strategy) -> bool:
        """Whether all of a strategy is of this space, so that a trial of it tells of others there."""
        known = {key for method in self.methods for key in (*(d.key for d in method.dimensions), *method.fixed)}
        return not self.objection(strategy) and strategy.knobs.keys() <= known

    def described(self) -> dict[str, Any]:
        """What is searched over, as plain JSON: two spaces with the same strategies have the same description."""
        return {
            method.name: {d.key: str(d) for d in method.dimensions}
            | {key: grammar.short(value) for key, value in method.fixed.items()}
            for method in sorted(self.methods, key=lambda method: method.name)
        }


def distributions(space: Space) -> dict[str, Any]:
    """Those that Optuna draws the parameters of strategies from, by name (`Space.parameters`)."""
    from optuna.distributions import CategoricalDistribution

    found: dict[str, Any] = {}
    for slot, methods in space.slots():
        found[slot_key(slot)] = CategoricalDistribution([NONE, *(m.name for m in methods)])
        found |= {d.key: d.distribution() for method in methods for d in method.dimensions}
    return found


def slot_key(slot: Slot) -> str:
    return f"slot.{slot.name.lower()}"


def read_space(methods: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> Space:
    """The space over `methods` (the composed `cfg.method`), with the user's narrowings.

    Args:
        methods: by name, each with its `_target_`.
        given: by full key, a fixed value, or a `Knob` with choices or with `low` and `high`.

    Raises:
        UserError: a narrowing outside what the knob allows, of an unknown setting, or nothing left to search.
    """
    for key in given:
        name = key.split(".")[1]
        if name not in methods and methods:
            raise UserError(
                f"{key}: {name} is not among the methods; name it in method=[...,{name}], or leave this out"
            )
    if not methods:
        raise UserError(
            "the space is empty: method=[] leaves nothing to search; give some methods, e.g. method=[rtn,nf4]"
        )
    return Space(tuple(_read_method(name, node, given) for name, node in methods.items()))


def _read_method(name: str, node: Mapping[str, Any], given: Mapping[str, Any]) -> Method:
    stage, prefix = target_of(node["_target_"]), f"method.{name}."
    knobs = knobs_of(stage)
    defaults = {f.name: f.default for f in dataclasses.fields(stage)}
    configured = {**defaults, **{key: value for key, value in node.items() if key in defaults}}
    for key in (key for key in given if key.split(".")[1] == name):
        setting, _, inner = key.removeprefix(prefix).partition(".")
        if setting not in defaults:
            raise UserError(f"{key}: there is no such knob; {name} has {', '.join(defaults) or 'none'}")
        if setting not in knobs and isinstance(given[key], Knob):
            raise UserError(f"{key} cannot be searched over; give one value, and run one search for each")
        if not inner and not isinstance(given[key], Knob):  # else the configuration has the whole of it
            configured[setting] = given[key]
    found = []
    for setting, knob in knobs.items():
        key = prefix + setting
        if key in given or knob.search:
            dimension = narrowed(key, knob, given[key]) if key in given else searched(key, knob)
            found.append(replace(dimension, when={prefix + k: v for k, v in knob.when.items()}))
    values = {prefix + k: v for k, v in configured.items()}
    changed = {prefix + k: v for k, v in defaults.items() if configured[k] != v}
    dimensions = _reachable(found, values, {k for k, v in given.items() if k in changed or isinstance(v, Knob)})
    kept, conditional = {d.key for d in dimensions}, {d.key for d in found if d.when}
    return Method(
        name,
        stage.slot,
        tuple(dimensions),
        # a method may refuse a knob that does not count: there it has its default, whatever it is configured as
        fixed={k: default if k in conditional else values[k] for k, default in changed.items() if k not in kept},
        idle={k: default for k, default in changed.items() if k in kept & conditional},
    )


def _reachable(dimensions: list[Dimension], configured: Mapping[str, Any], wanted: set[str]) -> list[Dimension]:
    """The knobs that count for some choice of the others.

    Raises:
        UserError: one that is wanted never counts.
    """
    possible = {key: (value,) for key, value in configured.items()} | {d.key: d.choices for d in dimensions}
    found = []
    for d in dimensions:
        never = [k for k, v in d.when.items() if possible.get(k) and not any(same(v, one) for one in possible[k])]
        if not never:
            found.append(d)
        elif d.key in wanted:
            other = f"{never[0]}={d.when[never[0]]}"
            raise UserError(
                f"{d.key} counts only with {other}, which is not searched over; leave it out, or add {other}"
            )
    return found
