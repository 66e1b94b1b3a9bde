"""The critic: plain code that decides whether a proposal may be tried. What it accepts is a strategy of the space and nothing else.

Every objection is a sentence that goes back to whoever proposed. Text that was not written here is quoted short and clean.
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
    """A proposal that says something of the space; it may still be one that is not to be tried."""

    strategy: Strategy
    reason: str = ""
    confidence: float | None = None


@dataclass
class Verdict:
    """What the critic makes of an answer: the first proposal that can be tried, and what is wrong with those before it."""

    idea: Idea | None = None
    objections: list[str] = field(default_factory=list)


def judge(answer: Any, most: int, history: History, space: Space, outlook: Forecaster) -> Verdict:
    """Looks at the proposals of an answer in their order; those past the first `most` are not looked at."""
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
            objections = objections_to(idea.strategy, history, outlook)
            if not objections:
                verdict.idea = idea
                return verdict
        verdict.objections += [f"Proposal {number}: {objection}" for objection in objections]
    return verdict


def read(node: Any, space: Space) -> tuple[Idea | None, list[str]]:
    """A proposal in the form of the schema, read against the space; None with objections if it does not keep to it."""
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
    """The strategy that a list of methods with knobs stands for."""
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
            known = ", ".join(m.name for m in space.methods)
            objections.append(f"there is no method {_quoted(node['name'])} in this space; it has {known}.")
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


def objections_to(strategy: Strategy, history: History, outlook: Forecaster) -> list[str]:
    """Why a strategy of the space is not to be tried."""
    if not strategy.methods:
        return ["it is the base model itself, which is known; name at least one method."]
    if strategy.overrides in history.seen:
        running = any(s.overrides == strategy.overrides for s in history.running.values())
        state = "is running now" if running else "was proposed before"
        return [f"{strategy} {state}; propose another one."]
    refusal = outlook.infeasible_reason(strategy)
    return [f"{strategy} cannot be tried: {clean(refusal, 300)}"] if refusal else []


def clean(text: str, most: int) -> str:
    """One line of at most `most` characters without control characters: safe to print, and to quote in a brief."""
    shown = (" " if unicodedata.category(c).startswith(("C", "Z")) else c for c in str(text)[: 4 * most])
    line = " ".join("".join(shown).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _out_of_order(chosen: list[Method], method: Method) -> list[str]:
    for other in chosen:
        if other.slot == method.slot:
            slot = method.slot.name.lower()
            return [f"{other.name} and {method.name} are both of the {slot} slot, which takes one method."]
        if other.slot > method.slot:
            return [f"{method.name} ({method.slot.name.lower()}) must come before {other.name}."]
    return []


def _knobs(method: Method, given: Any) -> tuple[dict[str, Any], list[str]]:
    """The values of a method's knobs by full key."""
    if not isinstance(given, dict):
        return {}, [f"the knobs of {method.name} must be an object, not {_quoted(given)}."]
    prefix = f"method.{method.name}."
    own = {d.key.removeprefix(prefix): d for d in method.dimensions}
    objections, values = [], {}
    count = {d.key for d in method.counting({prefix + str(name): value for name, value in given.items()})}
    everywhere = {**method.idle, **method.fixed}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if key not in count and same(everywhere.get(key, _MISSING), value):
            continue  # every strategy with the method has it so
        if name not in own:
            has = f"it has {', '.join(own)}" if own else "it has none"
            objections.append(f"{method.name} has no knob {_quoted(name)}; {has}.")
        elif not own[name].holds(value):
            objections.append(f"{method.name}.{name} must be {_described(own[name])}, not {_quoted(value)}.")
        else:
            values[prefix + name] = own[name].nearest(value)
    wanted = {d.key for d in method.counting(values)}
    for name, dimension in own.items():
        if dimension.key in wanted and name not in given:
            objections.append(f"{method.name}.{name} is missing; it is {_described(dimension)}.")
        elif dimension.key not in wanted and dimension.key in values:
            when = ", ".join(f"{key.removeprefix(prefix)}={value}" for key, value in dimension.when.items())
            objections.append(f"{method.name}.{name} counts only with {when}; leave it out.")
    return values, objections


def _described(dimension: Dimension) -> str:
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
    """The keys that do not belong there, and the list of proposals, also where a model has left out what is around it."""
    if isinstance(answer, dict) and not ("methods" in answer and "proposals" not in answer):
        unknown = [key for key in answer if key != "proposals"]
        proposals = answer.get("proposals")
        return unknown, proposals if isinstance(proposals, list) else []
    return [], answer if isinstance(answer, list) else [answer] if isinstance(answer, dict) else []
