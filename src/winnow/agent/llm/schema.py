"""Builds the JSON schema of what a language model may propose from the space; it allows no other proposals.

A method has *variants*: which knobs are active depends on the values of others (`Dimension.when`), and each such case is a
separate object in which every knob is required and no other is allowed. So the schema is as precise as the space.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from winnow.core.types import Strategy
from winnow.study.dimension import Dimension
from winnow.study.space import Method, Space


def proposals_schema(space: Space, most: int) -> dict[str, Any]:
    """Returns the schema of up to `most` proposals, the best first."""
    methods = [_object(_variant(method, knobs)) for method in space.methods for knobs in variants(method)]
    strategy = _object(
        {
            "reason": {"type": "string", "description": "why this is worth its time, in one or two sentences"},
            "methods": {"type": "array", "description": "in the order of slots", "items": {"anyOf": methods}},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1, "description": "that it reaches the front"},
        }
    )
    proposals = {"type": "array", "description": "the best first", "items": strategy, "minItems": 1, "maxItems": most}
    return {
        "title": "propose",
        "description": "Proposes strategies to try next.",
        **_object({"proposals": proposals}),
    }


def route_schema(specialists: Sequence[str]) -> dict[str, Any]:
    """Returns the schema of the coordinator's answer."""
    return {
        "title": "route",
        "description": "Says which specialist proposes next, and why.",
        **_object({"why": {"type": "string"}, "specialist": {"type": "string", "enum": list(specialists)}}),
    }


def variants(method: Method) -> list[dict[str, dict[str, Any]]]:
    """Returns the knobs of each variant of a method, by their names without the method's, with their schemas."""
    own = {d.key: d for d in method.dimensions}
    parents = [own[key] for key in sorted({k for d in own.values() for k in d.when}) if key in own and own[key].choices]
    cases: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for values in itertools.product(*(parent.choices for parent in parents)):
        parent_values = {parent.key: value for parent, value in zip(parents, values, strict=True)}
        keys = tuple(d.key for d in method.active(parent_values))
        # with one parent, cases with the same knobs are merged; with several, the merged values could form other combinations
        case = cases.setdefault(keys if len(parents) < 2 else (keys, values), {key: [] for key in parent_values})
        for key, value in parent_values.items():
            case[key].append(value)
    return [
        {
            key.rpartition(".")[2]: {"enum": choices[key]} if key in choices else _values(own[key])
            for key in (case if len(parents) < 2 else case[0])
        }
        for case, choices in cases.items()
    ]


def as_proposal(strategy: Strategy) -> dict[str, Any]:
    """Returns a strategy in the form of the schema."""
    methods = []
    for name in strategy.methods:
        own = f"method.{name}."
        knobs = {k.removeprefix(own): v for k, v in strategy.knobs.items() if k.startswith(own)}
        methods.append({"name": name, "knobs": knobs})
    return {"methods": methods}


def _variant(method: Method, knobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"name": {"type": "string", "enum": [method.name]}, "knobs": _object(knobs)}


def _values(dimension: Dimension) -> dict[str, Any]:
    if dimension.choices:
        return {"enum": list(dimension.choices)}
    kind = "integer" if dimension.integer else "number"
    return {"type": kind, "minimum": dimension.low, "maximum": dimension.high}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
