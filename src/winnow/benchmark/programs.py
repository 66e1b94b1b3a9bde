"""Computes pass@1 of generated programs for lm-eval's tasks: runs completions in the sandbox and counts those that pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from winnow.benchmark import sandbox


def program(doc: Mapping[str, Any], completion: str) -> str:
    """Returns a completed function, its tests, and the call that runs them (Chen et al. 2021, arXiv:2107.03374, section 2.2)."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def run(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Runs each completion of each item and returns its outcome, such as `passed`; lm-eval calls it as a filter."""
    programs = [program(doc, answer) for answers, doc in zip(responses, docs, strict=True) for answer in answers]
    outcomes = iter(sandbox.run(programs))
    return [[str(next(outcomes).outcome) for _ in answers] for answers in responses]


def pass_at_1(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the share of an item's completions that pass; 0 or 1 with one completion per item."""
    [outcomes] = results
    return {"pass@1": sum(outcome == sandbox.Outcome.PASSED for outcome in outcomes) / len(outcomes)}
