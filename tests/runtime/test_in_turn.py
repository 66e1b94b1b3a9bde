"""A candidate's requests in turn with the base model's: their order, the figures, and what happens where both do not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.logged import logged
from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import in_turn, latency
from winnow.runtime.in_turn import Base
from winnow.runtime.latency import Timing
from winnow.runtime.meters import Meters
from winnow.runtime.transformers import Runtime

ONE = Timing(0.1, 0.5)


def recorder(name: str, asked: list[str]) -> Callable[[], Timing]:
    def request() -> Timing:
        asked.append(name)
        return ONE

    return request


def test_requests_alternate_so_that_neither_comes_first_more_often() -> None:
    asked: list[str] = []
    hardware = Hardware("cpu", repeats=4, seconds=0)
    found = latency.time_requests([recorder("A", asked), recorder("B", asked)], hardware)
    assert "".join(asked) == "ABBAABBA" and [len(timings) for timings in found] == [4, 4]


def test_latency_takes_no_longer_than_it_may() -> None:
    asked: list[str] = []
    hardware = Hardware("cpu", repeats=100, seconds=100)
    latency.time_requests([recorder("A", asked)], hardware, most_seconds=0.0)
    assert asked == ["A"]


def test_times_are_brought_to_the_conditions_of_the_base_models_trial() -> None:
    hardware = Hardware("cpu", prompt_tokens=10, output_tokens=5)
    alone = latency.summarize([ONE] * 3, hardware)
    # the machine is twice as slow as it was when the base model took 400 ms, and has a bad moment
    ours, theirs = [ONE, ONE, Timing(0.3, 1.5)], [Timing(0.2, 0.8), Timing(0.2, 0.8), Timing(0.6, 2.4)]
    figures = in_turn.summarize(ours, theirs, 400.0, hardware)
    assert figures["latency_ratio"] == pytest.approx(0.625) and figures["latency_ms"] == pytest.approx(250)
    assert figures["latency_low_ms"] == figures["latency_high_ms"] == pytest.approx(250)  # the pairs agree
    assert (figures["latency_raw_ms"], figures["base_latency_ms"]) == (500, 800)
    assert figures["tpot_ms"] == pytest.approx(alone["tpot_ms"] / 2)
    assert figures["decode_tokens_per_s"] == pytest.approx(alone["decode_tokens_per_s"] * 2)
    assert figures["latency_requests"] == 3
    expected = {name: in_turn.SOURCE for name in alone if name != "latency_requests"}
    assert figures.sources == {**dict.fromkeys(figures, "measured"), **expected}


def measured(folder: Path, hardware: Hardware, tmp_path: Path, base: Base | None) -> tuple[dict[str, Any], list[str]]:
    with logged() as lines:
        figures = Meters(hardware, base)(LM(folder), Run(tmp_path))
    return {**figures, "source": figures.sources["latency_ms"]}, lines


def test_the_probe_measures_in_turn_and_closes_the_base_model(folder: Path, hardware: Hardware, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    base = LM(folder, name="base")
    found, lines = measured(folder, hardware, tmp_path, Base(base, 123.0, 1.0))
    assert found["source"] == in_turn.SOURCE and lines == []
    assert found["latency_ms"] == pytest.approx(123.0 * found["latency_raw_ms"] / found["base_latency_ms"])
    assert found["latency_low_ms"] <= found["latency_ms"] <= found["latency_high_ms"]
    assert base._model is None
    assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"memory_limit_bytes": 1e9}, "both take 100[0-9].[0-9] GB, and there are 1.0 GB"),
        ({"memory_limit_bytes": None}, "both take 100[0-9].[0-9] GB, and there are 2.0 GB"),
    ],
)
def test_what_does_not_fit_beside_the_base_model_is_measured_alone(
    folder: Path, hardware: Hardware, tmp_path: Path, limits: dict[str, float | None], message: str
) -> None:
    pytest.importorskip("codecarbon")
    base = Base(LM(folder), 123.0, 1e12, **limits)
    found, (line,) = measured(folder, replace(hardware, memory_limit_bytes=2_000_000_000), tmp_path, base)
    assert "latency_ratio" not in found and found["source"] == "measured"
    assert line.startswith("latency: measured alone, not in turn with the base model: both take 100")
    assert re.search(message, line)


def test_a_base_model_that_does_not_open_is_done_without(folder: Path, hardware: Hardware, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    found, (line,) = measured(folder, hardware, tmp_path, Base(LM(tmp_path / "gone"), 123.0, 1.0))
    assert found["source"] == "measured" and "opening it fails" in line


def test_a_runtime_that_takes_its_share_of_the_gpu_stands_alone(make_llama: Any, hardware: Hardware) -> None:
    served = Runtime(LM(model=make_llama()))
    base = Base(LM("base"), 1.0, 1.0)
    assert in_turn.refusal_reason(base, served, 1.0, hardware) == ""
    served.name = "vllm"
    assert "vLLM takes a fixed share" in in_turn.refusal_reason(base, served, 1.0, hardware)
