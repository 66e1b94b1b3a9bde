"""Requests in rows on a CUDA device, in 16 bits, where attention is one call for all segments."""

from __future__ import annotations

import pytest

from winnow.benchmark import rows
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS


def test_each_has_about_the_score_that_it_has_alone() -> None:
    model = pretrained(str(WEIGHTS), device="cuda").model
    asked = [(list(range(20, 31)), list(range(40, 40 + n))) for n in (1, 5, 2)] + [([7], [9, 30, 12])]
    assert rows.supports_packing(model)
    for found, request in zip(rows.scores(model, asked, 1000), asked, strict=True):
        assert found[0] == pytest.approx(rows.score_unpacked(model, request)[0], rel=0.02)
