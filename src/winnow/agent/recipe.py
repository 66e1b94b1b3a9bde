"""A fixed list of strategies, and no agent: what one would try first by hand.

python search.py experiment=baseline
python search.py 'recipe=[["method=[rtn]","method.rtn.bits=4"],["method=[nf4]"]]'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.agent.policy import Exhausted, Outlook, Suggestion
from winnow.search.history import History
from winnow.search.space import Space
from winnow.types import Strategy, UserError


@dataclass(frozen=True)
class Recipe:
    """One strategy after the other, until all were tried."""

    strategies: Sequence[Strategy]

    def ask(self, history: History, space: Space, outlook: Outlook) -> Suggestion:
        for strategy in self.strategies:
            if strategy.overrides not in history.seen:
                return Suggestion(strategy, "recipe", "next of the recipe")
        raise Exhausted("every strategy of the recipe was tried")


def read_recipe(lines: Sequence[Sequence[str]], space: Space, configured: Callable[[str], Any]) -> Recipe:
    """The strategies that lists of overrides describe; knobs that they leave out have their configured values.

    Raises:
        UserError: a method or a knob that is not in the space, or a value that it does not take.
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
            method = known[name]
            allowed = {d.key: d for d in method.dimensions}
            own = {k: v for k, v in given.items() if k.startswith(f"method.{name}.")}
            for key, value in own.items():
                if key not in allowed or (allowed[key].choices and value not in allowed[key].choices):
                    raise UserError(f"recipe: {key}={value} is not in the space; see --cfg job for its knobs")
            knobs |= method.defaults(lambda key, own=own: own.get(key, configured(key)))  # type: ignore[misc]
        stray = sorted(key for key in given if not any(key.startswith(f"method.{name}.") for name in methods))
        if stray:
            raise UserError(f"recipe: {stray[0]} belongs to none of its methods ({', '.join(methods)})")
        found.append(Strategy(methods, knobs))
    return Recipe(tuple(found))
