"""Defines the space of strategies: at most one method per slot, with its knobs, read from the methods themselves.

Users narrow the space on the command line with Hydra's own sweep grammar: `method.rtn.bits=choice(3,4)`,
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
from winnow.study.dimension import Dimension, Suggest, default_dimension, narrowed_dimension

NONE = "none"  # the choice that leaves a slot empty


@dataclass(frozen=True)
class Method:
    """A method of the space.

    Attributes:
        fixed: settings of every strategy with the method, by full key: those that are not searched over and differ from the
            method's own defaults.
        idle: the value of each conditional knob where it is inactive, by full key.
    """

    name: str
    slot: Slot
    dimensions: tuple[Dimension, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    idle: Mapping[str, Any] = field(default_factory=dict)

    def active(self, values: Mapping[str, Any]) -> list[Dimension]:
        """Returns the knobs that have an effect, given the values of others by full key."""
        return [d for d in self.dimensions if all(same(values.get(k, v), v) for k, v in d.when.items())]

    def knobs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all settings of a strategy with the method: the active ones of `values`, `idle` ones and `fixed` ones."""
        active = {d.key for d in self.active(values)}
        idle = {key: value for key, value in self.idle.items() if key not in active}
        return {key: value for key, value in values.items() if key in active} | idle | dict(self.fixed)

    def defaults(self, configured: Callable[[str], Any]) -> dict[str, Any]:
        """Returns each knob at its configured value, or at the nearest value in the space."""
        return self.knobs({d.key: d.nearest(configured(d.key)) for d in self.dimensions})


@dataclass(frozen=True)
class Space:
    """All strategies that a search may try."""

    methods: tuple[Method, ...]

    def slots(self) -> list[tuple[Slot, list[Method]]]:
        return self._slots

    def method(self, name: str) -> Method:
        return self._by_name[name]

    @functools.cached_property
    def _slots(self) -> list[tuple[Slot, list[Method]]]:
        ordered = sorted(self.methods, key=lambda m: m.slot)
        return [(slot, list(group)) for slot, group in itertools.groupby(ordered, key=lambda m: m.slot)]

    @functools.cached_property
    def _by_name(self) -> dict[str, Method]:
        return {method.name: method for method in self.methods}

    def draw(self, suggest: Suggest) -> Strategy:
        """Draws a strategy with `suggest`; it draws no knobs of methods that are not chosen."""
        chosen: list[str] = []
        knobs: dict[str, Any] = {}
        for slot, methods in self.slots():
            name = suggest.suggest_categorical(slot_key(slot), [NONE, *(m.name for m in methods)])
            if name == NONE:
                continue
            chosen.append(name)
            method = self.method(name)
            own = {d.key: d.draw(suggest) for d in method.dimensions if not d.when}
            own |= {d.key: d.draw(suggest) for d in method.active(own) if d.when}
            knobs |= method.knobs(own)
        return Strategy(tuple(chosen), knobs)

    def all(self, points: int) -> Iterator[Strategy]:
        """Yields every strategy, the empty one (the base model) first; ranges of numbers take `points` values."""
        per_slot = [[None, *self._variants(methods, points)] for _, methods in self.slots()]
        for combination in itertools.product(*per_slot):
            variants = [variant for variant in combination if variant is not None]
            yield Strategy(tuple(n for n, _ in variants), {k: v for _, own in variants for k, v in own.items()})

    def _variants(self, methods: list[Method], points: int) -> list[tuple[str, dict[str, Any]]]:
        """Returns every setting of each method, as the method's name and its knobs."""
        variants = []
        for method in methods:
            unconditional = [d for d in method.dimensions if not d.when]
            for values in itertools.product(*(d.grid(points) for d in unconditional)):
                own = {d.key: v for d, v in zip(unconditional, values, strict=True)}
                conditional = [d for d in method.active(own) if d.when]
                for conditional_values in itertools.product(*(d.grid(points) for d in conditional)):
                    knobs = own | {d.key: v for d, v in zip(conditional, conditional_values, strict=True)}
                    variants.append((method.name, method.knobs(knobs)))
        return variants

    def size(self) -> int | None:
        """Returns the number of strategies; None if a knob is a range of numbers."""
        if any(not d.choices for method in self.methods for d in method.dimensions):
            return None
        return math.prod(1 + len(self._variants(group, 1)) for _, group in self.slots())

    def parameters(self, strategy: Strategy) -> dict[str, Any]:
        """Returns the named choices that make `draw` return this strategy; choices outside the space are left out."""
        methods = [self._by_name[name] for name in strategy.methods if name in self._by_name]
        choices = {slot_key(method.slot): method.name for method in methods}
        if len(methods) == len(strategy.methods):
            choices = {slot_key(slot): NONE for slot, _ in self.slots()} | choices
        active = {d.key: d for method in methods for d in method.active(strategy.knobs)}
        return choices | {k: v for k, v in strategy.knobs.items() if k in active and active[k].contains(v)}

    def invalid_reason(self, strategy: Strategy) -> str:
        """Returns why a strategy cannot be tried in this space, "" if it can; it may have settings that are not searched over."""
        missing = [name for name in strategy.methods if name not in self._by_name]
        if missing:
            return f"method {missing[0]} is not searched over"
        methods = [self._by_name[name] for name in strategy.methods]
        slots = [method.slot for method in methods]
        if slots != sorted(set(slots)):
            return "its methods are not one a slot in the order of slots"
        for method in methods:
            for d in method.active(strategy.knobs):
                if d.key in strategy.knobs and not d.contains(strategy.knobs[d.key]):
                    return f"{d.key}={strategy.knobs[d.key]} is not searched over, only {d}"
            for key, value in method.fixed.items():
                if strategy.knobs.get(key) != value:
                    return f"{key} is not {value}, as it is in all of this space"
        return ""

    def contains(self, strategy: Strategy) -> bool:
        """Returns True if the space has all settings of a strategy, so that its trial is evidence for other strategies."""
        keys = {key for method in self.methods for key in (*(d.key for d in method.dimensions), *method.fixed)}
        return not self.invalid_reason(strategy) and strategy.knobs.keys() <= keys

    def description(self) -> dict[str, Any]:
        """Returns what is searched over, as plain JSON: spaces with the same strategies have the same description."""
        return {
            method.name: {d.key: str(d) for d in method.dimensions}
            | {key: grammar.quoted_if_needed(value) for key, value in method.fixed.items()}
            for method in sorted(self.methods, key=lambda method: method.name)
        }


def distributions(space: Space) -> dict[str, Any]:
    """Returns the Optuna distribution of each parameter of a strategy, by name (`Space.parameters`)."""
    from optuna.distributions import CategoricalDistribution

    by_name: dict[str, Any] = {}
    for slot, methods in space.slots():
        by_name[slot_key(slot)] = CategoricalDistribution([NONE, *(m.name for m in methods)])
        by_name |= {d.key: d.distribution() for method in methods for d in method.dimensions}
    return by_name


def slot_key(slot: Slot) -> str:
    return f"slot.{slot.name.lower()}"


def read_space(methods: Mapping[str, Mapping[str, Any]], narrowings: Mapping[str, Any]) -> Space:
    """Returns the space over `methods` (the composed `cfg.method`), with the user's narrowings.

    Args:
        methods: config nodes by name, each with its `_target_`.
        narrowings: by full key, a fixed value, or a `Knob` with choices or with `low` and `high`.

    Raises:
        UserError: a narrowing exceeds what the knob allows or names an unknown setting, or nothing is left to search.
    """
    for key in narrowings:
        name = key.split(".")[1]
        if name not in methods and methods:
            raise UserError(
                f"{key}: {name} is not among the methods; name it in method=[...,{name}], or leave this out"
            )
    if not methods:
        raise UserError(
            "the space is empty: method=[] leaves nothing to search; give some methods, e.g. method=[rtn,nf4]"
        )
    return Space(tuple(_read_method(name, node, narrowings) for name, node in methods.items()))


def _read_method(name: str, node: Mapping[str, Any], narrowings: Mapping[str, Any]) -> Method:
    stage, prefix = target_of(node["_target_"]), f"method.{name}."
    knobs = knobs_of(stage)
    defaults = {f.name: f.default for f in dataclasses.fields(stage)}
    configured = {**defaults, **{key: value for key, value in node.items() if key in defaults}}
    for key in (key for key in narrowings if key.split(".")[1] == name):
        setting, _, inner = key.removeprefix(prefix).partition(".")
        if setting not in defaults:
            raise UserError(f"{key}: there is no such knob; {name} has {', '.join(defaults) or 'none'}")
        if setting not in knobs and isinstance(narrowings[key], Knob):
            raise UserError(f"{key} cannot be searched over; give one value, and run one search for each")
        if not inner and not isinstance(narrowings[key], Knob):  # a narrowing of a part is already in the configuration
            configured[setting] = narrowings[key]
    candidates = []
    for setting, knob in knobs.items():
        key = prefix + setting
        if key in narrowings or knob.search:
            dimension = (
                narrowed_dimension(key, knob, narrowings[key]) if key in narrowings else default_dimension(key, knob)
            )
            candidates.append(replace(dimension, when={prefix + k: v for k, v in knob.when.items()}))
    values = {prefix + k: v for k, v in configured.items()}
    changed = {prefix + k: v for k, v in defaults.items() if configured[k] != v}
    required = {k for k, v in narrowings.items() if k in changed or isinstance(v, Knob)}
    dimensions = _reachable(candidates, values, required)
    searched, conditional = {d.key for d in dimensions}, {d.key for d in candidates if d.when}
    return Method(
        name,
        stage.slot,
        tuple(dimensions),
        # a method may refuse an inactive knob: the knob then has its default, whatever its configured value is
        fixed={k: default if k in conditional else values[k] for k, default in changed.items() if k not in searched},
        idle={k: default for k, default in changed.items() if k in searched & conditional},
    )


def _reachable(dimensions: list[Dimension], configured: Mapping[str, Any], required: set[str]) -> list[Dimension]:
    """Returns the knobs that are active for some choice of the others.

    Raises:
        UserError: a knob in `required` is never active.
    """
    possible = {key: (value,) for key, value in configured.items()} | {d.key: d.choices for d in dimensions}
    reachable = []
    for d in dimensions:
        unmet = [k for k, v in d.when.items() if possible.get(k) and not any(same(v, value) for value in possible[k])]
        if not unmet:
            reachable.append(d)
        elif d.key in required:
            other = f"{unmet[0]}={d.when[unmet[0]]}"
            raise UserError(
                f"{d.key} counts only with {other}, which is not searched over; leave it out, or add {other}"
            )
    return reachable
