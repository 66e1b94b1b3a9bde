"""The page of methods says what the code says."""

from __future__ import annotations

import json
import sys

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

from methods_page import FIGURES, LABELS, NOT_MEASURED, PAGE, classes, described, page, settings

METHODS = [name for name in classes() if name not in NOT_MEASURED]


@pytest.mark.parametrize("name", METHODS)
def test_each_class_says_where_it_is_from_and_what_it_takes(name: str) -> None:
    prose, labelled = described(classes()[name])
    assert prose
    assert list(labelled) == list(LABELS)
    assert all(labelled.values())


def test_the_page_is_made_of_what_the_classes_say_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(FIGURES.read_text(encoding="utf-8"))), (
        "make it anew: python bench/methods_page.py"
    )


def test_every_setting_was_measured() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))["figures"]
    assert set(figures) == set(settings())
