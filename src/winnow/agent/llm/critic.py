"""Decides with plain code whether a model's proposal may be tried; it accepts nothing but strategies of the space.

Every objection is a sentence that goes back to the model. Foreign text is quoted in a short and clean form.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from winnow.core.types import Strategy
from winnow.method.knobs import is_number, same
from winnow.study.dimension import Dimension
from winnow.study.history import History
from winnow.study.policy import Forecaster
from winnow.study.space import Method, Space

REASON_CHARACTERS = 600
QUOTED_CHARACTERS = 60
ALLOWED = ("methods", "reason", "confidence")
_MISSING = object()


@dataclass(frozen=True)
class Idea:
    """A proposal that is a strategy of the space; there may still be an objection to trying it."""

    strategy: Strategy
    reason: str = ""
    confidence: float | None = None


@dataclass
class Verdict:
    """The result for an answer: the first proposal that can be tried, and the objections to those before it."""

    idea: Idea | None = None
    objections: list[str] = field(default_factory=list)


def judge(answer: Any, most: int, history: History, space: Space, forecaster: Forecaster) -> Verdict:
    """Checks the first `most` proposals of an answer, in their order, until one can be tried."""
    verdict = Verdict()
    unknown, proposals = _proposals(answer)
    verdict.objections += [f"{_quoted(key)} is not a key of the answer; leave it out." for key in unknown]
    if verdict.objections:
        return verdict
    if not proposals:
        verdict.objections.append('The answer holds no "proposals"; it must be a list of at least one strategy.')
    for number, node in enumerate(proposals[:most], 1):
        idea, objections = read(node, space)
        if idea is not None:
            objections = objections_to(idea.strategy, history, forecaster)
            if not objections:
                verdict.idea = idea
                return verdict
        verdict.objections += [f"Proposal {number}: {objection}" for objection in objections]
    return verdict


def read(node: Any, space: Space) -> tuple[Idea | None, list[str]]:
    """Reads a proposal in the form of the schema; returns None and the objections if it is not valid in the space."""
    if not isinstance(node, dict):
        return None, [f"it must be an object with {', '.join(ALLOWED)}, not {_quoted(node)}."]
    objections = [f"{_quoted(key)} is not a key of a proposal; leave it out." for key in node if key not in ALLOWED]
    reason, confidence = node.get("reason", ""), node.get("confidence")
    if not isinstance(reason, str):
        objections.append("reason must be a string.")
    if confidence is not None and not (is_number(confidence) and 0 <= confidence <= 1):
        objections.append(f"confidence must be a number from 0 to 1, not {_quoted(confidence)}.")
    strategy, more = strategy_of(node.get("methods"), space)
    objections += more
    if objections or strategy is None:
        return None, objections
    return Idea(strategy, clean(reason, REASON_CHARACTERS), None if confidence is None else float(confidence)), []


def strategy_of(nodes: Any, space: Space) -> tuple[Strategy | None, list[str]]:
    """Returns the strategy that a list of methods with knobs describes, or None and the objections."""
    if not isinstance(nodes, list):
        return None, [f"methods must be a list of objects with name and knobs, not {_quoted(nodes)}."]
    objections: list[str] = []
    chosen: list[Method] = []
    knobs: dict[str, Any] = {}
    for node in nodes[:20]:
        if not isinstance(node, dict) or not isinstance(node.get("name"), str):
            objections.append(f"each of methods must be an object with name and knobs, not {_quoted(node)}.")
            continue
        method = next((m for m in space.methods if m.name == node["name"]), None)
        if method is None:
            names = ", ".join(m.name for m in space.methods)
            objections.append(f"there is no method {_quoted(node['name'])} in this space; it has {names}.")
            continue
        objections += [
            f"{_quoted(key)} is not a key of a method; leave it out." for key in node if key not in ("name", "knobs")
        ]
        values, more = _knobs(method, node.get("knobs", {}))
        objections += more
        objections += _out_of_order(chosen, method)
        chosen.append(method)
        knobs |= method.knobs(values)
    return (None if objections else Strategy(tuple(m.name for m in chosen), knobs)), objections


def objections_to(strategy: Strategy, history: History, forecaster: Forecaster) -> list[str]:
    """Returns why a strategy of the space must not be tried."""
    if not strategy.methods:
        return ["it is the base model itself, which is known; name at least one method."]
    if strategy.overrides in history.proposed:
        running = any(s.overrides == strategy.overrides for s in history.running.values())
        state = "is running now" if running else "was proposed before"
        return [f"{strategy} {state}; propose another one."]
    refusal = forecaster.infeasible_reason(strategy)
    return [f"{strategy} cannot be tried: {clean(refusal, 300)}"] if refusal else []


def clean(text: str, most: int) -> str:
    """Returns one line of at most `most` characters without control characters, safe to print and to quote in a brief."""
    printable = (" " if unicodedata.category(c).startswith(("C", "Z")) else c for c in str(text)[: 4 * most])
    line = " ".join("".join(printable).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _out_of_order(chosen: list[Method], method: Method) -> list[str]:
    """Returns an objection if the slot of a method does not come after those of the methods before it."""
    for other in chosen:
        if other.slot == method.slot:
            slot = method.slot.name.lower()
            return [f"{other.name} and {method.name} are both of the {slot} slot, which takes one method."]
        if other.slot > method.slot:
            return [f"{method.name} ({method.slot.name.lower()}) must come before {other.name}."]
    return []


def _knobs(method: Method, knobs: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the valid values of a method's knobs by full key, and the objections to the others."""
    if not isinstance(knobs, dict):
        return {}, [f"the knobs of {method.name} must be an object, not {_quoted(knobs)}."]
    prefix = f"method.{method.name}."
    own = {d.key.removeprefix(prefix): d for d in method.dimensions}
    objections, values = [], {}
    active = {d.key for d in method.active({prefix + str(name): value for name, value in knobs.items()})}
    constants = {**method.idle, **method.fixed}
    for name, value in knobs.items():
        key = f"{prefix}{name}"
        if key not in active and same(constants.get(key, _MISSING), value):
            continue  # every strategy with the method has this value
        if name not in own:
            has = f"it has {', '.join(own)}" if own else "it has none"
            objections.append(f"{method.name} has no knob {_quoted(name)}; {has}.")
        elif not own[name].contains(value):
            objections.append(f"{method.name}.{name} must be {_allowed(own[name])}, not {_quoted(value)}.")
        else:
            values[prefix + name] = own[name].nearest(value)
    required = {d.key for d in method.active(values)}
    for name, dimension in own.items():
        if dimension.key in required and name not in knobs:
            objections.append(f"{method.name}.{name} is missing; it is {_allowed(dimension)}.")
        elif dimension.key not in required and dimension.key in values:
            when = ", ".join(f"{key.removeprefix(prefix)}={value}" for key, value in dimension.when.items())
            objections.append(f"{method.name}.{name} counts only with {when}; leave it out.")
    return values, objections


def _allowed(dimension: Dimension) -> str:
    """Returns the values of a knob in words."""
    if dimension.choices:
        return f"one of {', '.join(json.dumps(choice) for choice in dimension.choices)}"
    kind = "a whole number" if dimension.integer else "a number"
    return f"{kind} from {dimension.low:g} to {dimension.high:g}"


def _quoted(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True) if not isinstance(value, Mapping | list) else type(value).__name__
    except (TypeError, ValueError):
        text = type(value).__name__
    return clean(text, QUOTED_CHARACTERS)


def _proposals(answer: Any) -> tuple[list[str], list[Any]]:
    """Returns the unknown keys of an answer and its list of proposals, even if the model left out the object around the list."""
    if isinstance(answer, dict) and not ("methods" in answer and "proposals" not in answer):
        unknown = [key for key in answer if key != "proposals"]
        proposals = answer.get("proposals")
        return unknown, proposals if isinstance(proposals, list) else []
    return [], answer if isinstance(answer, list) else [answer] if isinstance(answer, dict) else []
