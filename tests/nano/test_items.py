"""The shipped test sets are what the generator makes, have no item twice, and are kept out of training."""

from __future__ import annotations

import itertools
import json

import pytest

from winnow.nano.datasets import DATA, TEXT, render, write
from winnow.nano.items import FAMILIES, TEST_ITEMS, Dial, benchmark_items, held_out_text, training_items


@pytest.mark.parametrize("name", [*FAMILIES, TEXT])
def test_the_generator_reproduces_the_shipped_files(name: str) -> None:
    assert (DATA / f"{name}.jsonl").read_bytes() == render(name).encode("utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_no_item_is_there_twice(name: str) -> None:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == TEST_ITEMS == len({row["prompt"] for row in rows})
    assert [row["prompt"] for row in rows] == [item.prompt for item in benchmark_items(name)]


def test_training_shares_no_prompt_with_the_tests() -> None:
    tests = {item.prompt for name in FAMILIES for item in benchmark_items(name)}
    held_out = {item.completion for item in held_out_text()}
    for item in itertools.islice(training_items(), 30_000):
        assert item.prompt not in tests and item.completion not in held_out


def test_training_differs_with_the_seed_and_repeats() -> None:
    first, again, other = (list(itertools.islice(training_items(seed=s), 200)) for s in (1, 1, 2))
    assert first == again != other


def test_a_dial_makes_items_easier() -> None:
    easy = Dial(max_start=3, max_step=2, max_steps=1)
    assert max(len(i.completion) for i in benchmark_items("nano_gsm8k", 50, easy)) < max(
        len(i.completion) for i in benchmark_items("nano_gsm8k", 50)
    )


def test_files_are_written_where_wanted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert {path.stem for path in write(tmp_path)} == {*FAMILIES, TEXT}
