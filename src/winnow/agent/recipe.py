"""A fixed list of strategies, and no agent: what one would try first by hand.

python search.py experiment=baseline
python search.py 'recipe=[["method=[rtn]","method.rtn.bits=4"],["method=[nf4]"]]'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.core.cli import say
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Suggestion
from winnow.study.space import Method, Space


@dataclass(frozen=True)
class Recipe:
    """One strategy after the other, until all were tried."""

    strategies: Sequence[Strategy]

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        for strategy in self.strategies:
            if strategy.overrides not in history.seen:
                return Suggestion(strategy, "recipe", "next of the recipe")
        raise Exhausted("every strategy of the recipe was tried")


def read_recipe(
    lines: Sequence[Sequence[str]], space: Space, configured: Callable[[str], Any], log: Callable[[str], None] = say
) -> Recipe:
    """The strategies that lists of overrides describe; knobs that they leave out have their configured values.

    A value that its method allows and that is not searched over becomes the nearest one that is, and `log` is told.

    Raises:
        UserError: a method that is not in the space, a setting that there is not, or a value that it does not take.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = []
    for line in lines:
        given = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(line))}
        named = given.pop("method", None)
        methods = tuple(map(str, named)) if isinstance(named, list) else ()
        known = {method.name: method for method in space.methods}
        missing = [name for name in methods if name not in known]
        if missing or not methods:
            raise UserError(f"recipe: {list(line)}: give method=[...] with some of {', '.join(known)}")
        knobs: dict[str, Any] = {}
        for name in methods:
            own = {k: v for k, v in given.items() if k.startswith(f"method.{name}.")}
            knobs |= _settings(known[name], own, configured, log)
        stray = sorted(key for key in given if not any(key.startswith(f"method.{name}.") for name in methods))
        if stray:
            raise UserError(f"recipe: {stray[0]} belongs to none of its methods ({', '.join(methods)})")
        found.append(Strategy(methods, knobs))
    return Recipe(tuple(found))


def _settings(
    method: Method, own: Mapping[str, Any], configured: Callable[[str], Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """All settings of a method as a recipe gives `own`, by full key."""
    dimensions = {d.key: d for d in method.dimensions}
    for key, value in own.items():
        d = dimensions.get(key)
        if d is None and key not in method.fixed:
            raise UserError(
                f"recipe: {key}={value} is not in the space; give what is not searched over beside the recipe, for all of it"
            )
        if d is not None and not d.knob.allows(value):
            raise UserError(f"recipe: {key}={value} is not in the space: it takes {d.knob.described}")
        used = method.fixed[key] if d is None else d.nearest(value)
        if used != value:
            log(f"recipe: {key}={value} is not searched over; {used} takes its place")
    return method.defaults(lambda key: own.get(key, configured(key)))
