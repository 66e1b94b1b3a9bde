"""Requests in rows: each has the score that it has alone, and nothing is read twice."""

from __future__ import annotations

import pytest
import torch

from tests.method.shapes import FAMILIES
from tests.model.test_packed_attention import model_of
from tests.training.test_student import stateful
from winnow.benchmark import rows
from winnow.benchmark.rows import Request


def requests() -> list[Request]:
    """Two questions with choices of several lengths, one text by itself, and one of a single token."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    first, second = ids(11), ids(4)
    shared = [(first, ids(n)) for n in (1, 5, 2)] + [(second, ids(n)) for n in (3, 1)] + [(first, ids(4))]
    return [*shared, (ids(1), ids(17)), (ids(9), ids(1))]


@pytest.mark.parametrize("most_tokens", [1, 24, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_each_has_the_score_that_it_has_alone(family: str, most_tokens: int) -> None:
    model = model_of(family)
    asked = requests()
    for found, expected in zip(
        rows.scores(model, asked, most_tokens), (rows.score_unpacked(model, x) for x in asked), strict=True
    ):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert rows.supports_packing(model)


def test_a_choice_does_not_see_the_others() -> None:
    model, (context, choice) = model_of("llama"), requests()[1]
    found, changed = (
        rows.scores(model, [(context, other), (context, choice)], 1000)[1] for other in ([7, 8, 9], [9, 3, 4])
    )
    assert found == changed


def test_what_is_greedy_is_found() -> None:
    model, context = model_of("llama"), list(range(5, 12))
    ids = torch.tensor([context])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    greedy = ids[0, len(context) :].tolist()
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 60]
    assert [score[1] for score in rows.scores(model, [(context, greedy), (context, wrong)], 1000)] == [True, False]


def test_a_context_is_read_once_in_a_row() -> None:
    (row,) = rows.rows(requests(), 10_000)
    context = list(requests()[0][0])
    starts = [i for i in range(len(row.ids)) if row.ids[i : i + len(context)] == context]
    assert len(starts) == 1
    for row in rows.rows(requests(), 24):
        assert len(row.ids) <= 24
        assert len(row.ids) == len(row.positions) == sum(s.stop - s.start for s in row.segments)


def test_a_model_that_keeps_a_state_across_positions_is_found_out() -> None:
    assert not rows.supports_packing(stateful())
