"""Paired comparisons, and the figures of one model."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest

from winnow.benchmark import samples
from winnow.benchmark.compare import compare, compare_outcomes, interval, mcnemar, table
from winnow.benchmark.figures import figures, mean_and_error
from winnow.benchmark.samples import Sample
from winnow.core.errors import UserError
from winnow.data.task_spec import Spec


def sample(number: int, correct: bool | None, benchmark: str = "a", **changes: object) -> Sample:
    one = Sample(benchmark, "part", f"doc{number}", f"prompt{number}", "p", "t", correct, float(bool(correct)))
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 * 0.5**5)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert 0.0 < mcnemar(1900, 2100) < 0.01  # thousands of flips do not overflow


def test_the_interval_covers_the_true_difference() -> None:
    rng = random.Random(0)
    lost_rate, gained_rate, items, inside = 0.06, 0.03, 120, 0
    for _ in range(2000):
        rolls = [rng.random() for _ in range(items)]
        lost = sum(roll < lost_rate for roll in rolls)
        gained = sum(lost_rate <= roll < lost_rate + gained_rate for roll in rolls)
        low, high = interval(lost, gained, items)
        inside += low <= gained_rate - lost_rate <= high
    assert 0.93 < inside / 2000 < 0.98


def test_outcomes() -> None:
    found = compare_outcomes("a", [True, True, False, False, True], [True, False, True, False, False])
    assert (found.lost, found.gained, found.items) == (2, 1, 5)
    assert found.difference == pytest.approx(found.accuracy - found.base_accuracy) == pytest.approx(-0.2)
    assert found.low < found.difference < found.high and found.p_value == 1.0


def test_files_are_joined_by_item(tmp_path: Path) -> None:
    base = [sample(n, n % 2 == 0) for n in range(10)] + [sample(n, True, "b") for n in range(4)]
    other = [sample(n, True) for n in range(10)][::-1] + [sample(n, False, "b") for n in (0, 1, 9)]
    text = [sample(99, None, "text", log_likelihoods=(-1.5,), extra={"tokens": 3})]
    (tmp_path / "base").mkdir()
    samples.write(base + text, tmp_path / "base" / samples.FILE)
    samples.write(other + text, tmp_path / "other.parquet")
    assert samples.read(tmp_path / "base") == base + text  # as written
    a, b, both = compare(tmp_path / "base", tmp_path / "other.parquet")
    assert (a.benchmark, a.items, a.gained, a.lost) == ("a", 10, 5, 0)
    assert (b.benchmark, b.items, b.gained, b.lost) == ("b", 2, 0, 2)
    assert (both.benchmark, both.items, both.gained, both.lost) == ("all", 12, 5, 2)
    assert table([a, b, both]).count("\n") == 3


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    samples.write([sample(1, True)], tmp_path / "a.parquet")
    samples.write([sample(1, True, prompt_hash="other")], tmp_path / "b.parquet")
    samples.write([sample(2, True)], tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_text("nonsense", encoding="utf-8")
    for other, message in (
        ("b.parquet", "different prompts"),
        ("c.parquet", "no item in common"),
        ("d.parquet", "is not a table of samples"),
        ("e.parquet", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            compare(tmp_path / "a.parquet", tmp_path / other)


def test_means_and_errors() -> None:
    values = {"x": [1.0, 0.0, 1.0, 1.0], "y": [0.0, 0.0]}
    mean, error = mean_and_error(values)
    assert mean == 0.5 and error == pytest.approx(math.sqrt(0.3 / 6))
    mean, error = mean_and_error(values, "subtasks")
    assert mean == 0.375 and error == pytest.approx(math.sqrt(0.25 / 4 + 0) / 2)
    assert mean_and_error({"x": [1.0]}) == (1.0, 0.0)
    assert mean_and_error({"x": [1.0], "y": [0.0]}, "subtasks") == (0.5, pytest.approx(math.sqrt(0.5 + 0.5) / 2))


def test_figures_of_a_run() -> None:
    text = [sample(n, None, "t", score=-2 * math.log(4), extra={"tokens": 2, "bytes": 4}) for n in range(3)]
    scored = [
        (Spec("a", "f", "t", also={"mc2": "x"}), [sample(n, n > 0, extra={"mc2": 0.5}) for n in range(4)]),
        (Spec("b", "f", "t"), [sample(n, True, "b") for n in range(2)]),
        (Spec("t", "f", "t", metric=None), text),
    ]
    found = figures(scored)
    assert found["a"] == 0.75 and found["b"] == 1.0 and found["accuracy"] == 0.875 and found["a_mc2"] == 0.5
    assert found["accuracy_stderr"] == pytest.approx(found["a_stderr"] / 2) and found["items"] == 9
    assert found["perplexity"] == pytest.approx(4.0) and found["bits_per_byte"] == pytest.approx(1.0)
    assert set(found.sources.values()) == {"measured"}
    hopeless = [sample(0, None, "t", score=-1e9, extra={"tokens": 2, "bytes": 4})]
    assert figures([(Spec("t", "f", "t", metric=None), hopeless)])["perplexity"] == math.inf
