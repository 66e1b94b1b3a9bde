"""Whose place on the front holds on items that the search did not use."""

from __future__ import annotations

from winnow.benchmark.score import questions
from winnow.core.types import Strategy, Trial
from winnow.study.objectives import KNOWN
from winnow.study.pareto import fails_on_holdout

OBJECTIVES = (KNOWN["accuracy"], KNOWN["size_bytes"])


def trial(number: int, accuracy: float, size: float) -> Trial:
    return Trial(number, Strategy(("rtn",)), figures={"accuracy": accuracy, "size_bytes": size})


def test_a_place_that_rests_on_chance_is_named() -> None:
    small, large = trial(1, 0.90, 1e6), trial(2, 0.91, 2e6)  # on the front for a point of accuracy
    front = (small, large)
    lost = {1: {"accuracy": 0.905}, 2: {"accuracy": 0.900}}
    held = {1: {"accuracy": 0.880}, 2: {"accuracy": 0.890}}
    assert (
        fails_on_holdout(large, front, lost, OBJECTIVES)
        == "trial 1 is no worse in anything else, and as good on fresh items"
    )
    assert fails_on_holdout(large, front, held, OBJECTIVES) == ""
    assert (
        fails_on_holdout(small, front, lost, OBJECTIVES) == "" == fails_on_holdout(small, front, held, OBJECTIVES)
    )  # nothing is as small


def test_nobody_is_blamed_for_what_was_not_confirmed() -> None:
    front = (trial(1, 0.9, 1e6), trial(2, 0.91, 2e6))
    assert fails_on_holdout(front[1], front, {}, OBJECTIVES) == ""
    assert fails_on_holdout(front[1], front, {2: {"accuracy": 0.5}}, OBJECTIVES) == ""


class Task:
    def __init__(self, items: int) -> None:
        self.eval_docs = [{"question": f"item {n}"} for n in range(items)]


class Loaded:
    subtask = "some"

    def __init__(self, items: int) -> None:
        self.task = Task(items)


def test_held_out_items_are_never_seen_by_the_search_whatever_its_limit() -> None:
    tasks = [Loaded(500)]
    asked = {q.doc_hash for q in questions(tasks, None, 1, holdout_share=0.2)}  # type: ignore[arg-type]
    fresh = {q.doc_hash for q in questions(tasks, None, 1, holdout_share=0.2, score_holdout=True)}  # type: ignore[arg-type]
    every = {q.doc_hash for q in questions(tasks, None, 1)}  # type: ignore[arg-type]
    assert not asked & fresh and asked | fresh == every and 60 < len(fresh) < 140
    few = {q.doc_hash for q in questions(tasks, 50, 1, holdout_share=0.2)}  # type: ignore[arg-type]
    assert len(few) == 50 and few < asked
    assert {q.doc_hash for q in questions(tasks, 30, 1, 0.2, True)} < fresh  # type: ignore[arg-type]
