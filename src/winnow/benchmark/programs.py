"""pass@1 of generated programs, as lm-eval's tasks call it: completions are run in the sandbox, then counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from winnow.benchmark import sandbox


def program(doc: Mapping[str, Any], completion: str) -> str:
    """A completed function, its tests, and the call of them (Chen et al. 2021, arXiv:2107.03374, section 2.2)."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def run(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A filter of lm-eval: of each completion of each item how its tests went, `passed` among others."""
    programs = [program(doc, each) for answers, doc in zip(responses, docs, strict=True) for each in answers]
    outcomes = iter(sandbox.run(programs))
    return [[str(next(outcomes).outcome) for _ in answers] for answers in responses]


def pass_at_1(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of an item's completions that pass; with one each, as here, whether it does."""
    [outcomes] = results
    return {"pass@1": sum(outcome == sandbox.Outcome.PASSED for outcome in outcomes) / len(outcomes)}
