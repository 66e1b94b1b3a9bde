"""Proposes a fixed list of strategies, in place of an agent.

python search.py experiment=baseline
python search.py 'recipe=[["method=[rtn]","method.rtn.bits=4"],["method=[nf4]"]]'
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Suggestion
from winnow.study.space import Method, Space

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Proposes one strategy after the other, until all were tried."""

    strategies: Sequence[Strategy]

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        for strategy in self.strategies:
            if strategy.overrides not in history.proposed:
                return Suggestion(strategy, "recipe", "next of the recipe")
        raise Exhausted("every strategy of the recipe was tried")


def read_recipe(lines: Sequence[Sequence[str]], space: Space, configured: Callable[[str], Any]) -> Recipe:
    """Returns the strategies that lists of overrides describe; knobs that they leave out have their configured values.

    A value that its method allows but the space does not contain becomes the nearest one in the space, with a log line.

    Raises:
        UserError: a method that is not in the space, an unknown setting, or a value that the method does not allow.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    strategies = []
    for line in lines:
        overrides = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(line))}
        names = overrides.pop("method", None)
        methods = tuple(map(str, names)) if isinstance(names, list) else ()
        available = {method.name: method for method in space.methods}
        missing = [name for name in methods if name not in available]
        if missing or not methods:
            raise UserError(f"recipe: {list(line)}: give method=[...] with some of {', '.join(available)}")
        knobs: dict[str, Any] = {}
        for name in methods:
            own = {k: v for k, v in overrides.items() if k.startswith(f"method.{name}.")}
            knobs |= _settings(available[name], own, configured)
        stray = sorted(key for key in overrides if not any(key.startswith(f"method.{name}.") for name in methods))
        if stray:
            raise UserError(f"recipe: {stray[0]} belongs to none of its methods ({', '.join(methods)})")
        strategies.append(Strategy(methods, knobs))
    return Recipe(tuple(strategies))


def _settings(method: Method, own: Mapping[str, Any], configured: Callable[[str], Any]) -> dict[str, Any]:
    """Returns all settings of a method by full key; `own` are the recipe's overrides of the method."""
    dimensions = {d.key: d for d in method.dimensions}
    for key, value in own.items():
        d = dimensions.get(key)
        if d is None and key not in method.fixed:
            raise UserError(
                f"recipe: {key}={value} is not in the space; give what is not searched over beside the recipe, for all of it"
            )
        if d is not None and not d.knob.allows(value):
            raise UserError(f"recipe: {key}={value} is not in the space: it takes {d.knob.allowed_values}")
        used = method.fixed[key] if d is None else d.nearest(value)
        if used != value:
            logger.info(f"recipe: {key}={value} is not searched over; {used} takes its place")
    return method.defaults(lambda key: own.get(key, configured(key)))
