"""The probe on a tiny model: which figures, in which order of size, from which source."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.benchmark.protocol import Probe
from winnow.core.errors import MissingExtra, UserError
from winnow.hardware import energy
from winnow.hardware.device import Hardware
from winnow.hardware.energy import EnergyMeter
from winnow.hardware.inventory import Gpu
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import latency
from winnow.runtime.latency import Timing
from winnow.runtime.meters import Meters
from winnow.runtime.transformers import Runtime

MEASURED = {
    "size_bytes",
    "weights_memory_bytes",
    "peak_memory_bytes",
    "latency_ms",
    "latency_low_ms",
    "latency_high_ms",
    "ttft_ms",
    "ttft_p90_ms",
    "tpot_ms",
    "tpot_p90_ms",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "latency_requests",
}
METERED = {"energy_wh_per_1k_tokens", "co2_g_per_1k_tokens"}


def busy(cpu_seconds: float) -> None:
    """Works until this process has used so much processor time, however long that takes."""
    until = os.times().user + os.times().system + cpu_seconds
    while os.times().user + os.times().system < until:
        sum(range(10000))


def test_the_probe_finds_all_figures(folder: Path, hardware: Hardware, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    meters = Meters(hardware)
    assert isinstance(meters, Probe)
    figures = meters(LM(folder), Run(tmp_path))
    assert set(figures) == set(figures.sources) == MEASURED | METERED
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert {figures.sources[name] for name in MEASURED} == {"measured"}
    assert {figures.sources[name] for name in METERED} <= {"counter", "estimated"}
    assert figures["ttft_ms"] <= figures["ttft_p90_ms"]
    assert figures["tpot_ms"] <= figures["tpot_p90_ms"]
    assert figures["ttft_ms"] < figures["latency_ms"]
    assert figures["latency_low_ms"] <= figures["latency_ms"] <= figures["latency_high_ms"]
    assert figures["latency_requests"] == hardware.repeats
    assert figures["peak_memory_bytes"] > figures["weights_memory_bytes"]
    per_wh = figures["co2_g_per_1k_tokens"] / figures["energy_wh_per_1k_tokens"]
    assert per_wh == pytest.approx(hardware.carbon_g_per_kwh / 1000)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_request_has_its_exact_length_though_tokens_would_end_it(batch: int, make_llama: Any) -> None:
    served = Runtime(LM(model=make_llama()))
    asked = latency.random_prompts(served.vocab_size, batch, 5, seed=1)
    assert len(asked) == batch and {len(ids) for ids in asked} == {5}
    assert asked == latency.random_prompts(served.vocab_size, batch, 5, seed=1)
    assert asked != latency.random_prompts(served.vocab_size, batch, 5, seed=2)
    timing = served.request(asked, 9)
    assert 0 < timing.first_s < timing.total_s


def test_the_clock_leaves_the_tokens_alone(make_llama: Any) -> None:
    model = make_llama(eos_token_id=None)
    asked = latency.random_prompts(96, 2, 6, seed=0)
    kept = {}
    original = model.generate

    def generate(**settings: object) -> torch.Tensor:
        kept["output"] = original(**settings)
        return kept["output"]

    model.generate = generate  # type: ignore[method-assign,assignment]
    Runtime(LM(model=model)).request(asked, 7)
    ids = torch.tensor(asked)
    with torch.inference_mode():
        for _ in range(7):  # the plain reference: no cache, the best token each time
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(kept["output"], ids)


def test_figures_follow_their_definitions() -> None:
    hardware = Hardware("cpu", latency_batch_size=4, prompt_tokens=10, output_tokens=5)
    figures = latency.summarize([Timing(0.1, 0.5), Timing(0.2, 1.0), Timing(0.1, 0.5)], hardware)
    assert figures["latency_ms"] == 500
    assert figures["ttft_ms"] == 100
    assert figures["ttft_p90_ms"] == pytest.approx(180)
    assert figures["tpot_ms"] == pytest.approx(100)
    assert figures["prefill_tokens_per_s"] == pytest.approx(4 * 10 / 0.1)
    assert figures["decode_tokens_per_s"] == pytest.approx(4 / 0.1)


def test_more_time_gives_more_requests(hardware: Hardware, make_llama: Any) -> None:
    served = Runtime(LM(model=make_llama()))
    asked = latency.random_prompts(served.vocab_size, 1, 4, seed=0)

    def request() -> Timing:
        return served.request(asked, 4)

    (timings,) = latency.time_requests([request], hardware)
    assert len(timings) == hardware.repeats
    (timings,) = latency.time_requests([request], Hardware("cpu", repeats=1, seconds=1.0))
    assert len(timings) > 1


@pytest.mark.parametrize(
    ("tokens", "seconds", "updates", "requests"),
    [
        (16, 60.0, 1, 4),  # of four tokens each
        (1000, 0.0, 1, 1),
        (1, 60.0, 3, 3),  # the counter moves with every third
    ],
)
def test_energy_is_metered_over_tokens_or_time_and_one_update_of_the_counter(
    tokens: int, seconds: float, updates: int, requests: int, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def request() -> Timing:
        asked.append(1)
        return Timing(0.1, 0.2)

    def counter(gpus: Sequence[Gpu]) -> list[int]:
        return [len(asked) // updates * 3_600_000]  # mJ: a Wh an update

    monkeypatch.setattr(energy, "gpu_counters_mj", counter)
    monkeypatch.setattr(energy, "used_gpus", lambda *_: (Gpu("g", "GPU-a", 8),))
    meters = Meters(dataclasses.replace(hardware, device="cuda", energy_tokens=tokens, energy_seconds=seconds))
    figures = meters.energy(request)
    assert len(asked) == requests
    assert figures["energy_wh_per_1k_tokens"] == pytest.approx(1000 / 4 / updates)
    assert figures.sources["energy_wh_per_1k_tokens"] == "counter"


def test_warming_up_ends_with_its_time(hardware: Hardware) -> None:
    asked: list[int] = []

    def request() -> Timing:
        asked.append(1)
        return Timing(0.1, 0.2)

    meters = Meters(dataclasses.replace(hardware, warmup=5))
    meters.warm_up(request, deadline=math.inf)
    meters.warm_up(request, deadline=0.0)
    assert len(asked) == 5 + 1


def test_a_workload_beyond_the_context_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hardware.prompt_tokens=60 .* make 65 tokens, the model's context is 64"):
        Meters(Hardware("cpu", prompt_tokens=60, output_tokens=5))(LM(folder), Run(tmp_path))


def test_energy_grows_with_the_work_and_names_its_source() -> None:
    pytest.importorskip("codecarbon")
    found = []
    for seconds in (0.2, 0.8):
        with EnergyMeter(carbon_g_per_kwh=100, device="cpu", required=True) as spent:
            busy(seconds)
        assert spent.source in ("counter", "estimated")
        assert spent.co2_g == pytest.approx(spent.wh / 10)
        found.append(spent.wh)
    assert 0 < found[0] < found[1]


def test_the_machine_is_known_before_the_work_that_is_metered(
    folder: Path, hardware: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("codecarbon")
    order: list[str] = []
    detect, enter = energy.detect, EnergyMeter.__enter__
    monkeypatch.setattr(energy, "detect", lambda: (order.append("detect"), detect())[1])
    monkeypatch.setattr(EnergyMeter, "__enter__", lambda meter: (order.append("meter"), enter(meter))[1])
    Meters(hardware)(LM(folder), Run(tmp_path))
    assert order[0] == "detect" and "meter" in order


def test_the_processors_share_follows_the_time_it_worked() -> None:
    pytest.importorskip("codecarbon")
    energy.detect()
    tracker = energy._tracker(475.0)
    tracker.start_task("idle")
    idle = tracker.stop_task("idle")
    spent = []
    for seconds in (0.3, 0.9):
        tracker = energy._tracker(475.0)
        tracker.start_task("work")
        busy(seconds)
        spent.append(tracker.stop_task("work").cpu_energy)
    assert idle.cpu_energy <= spent[0]
    if not energy._host_energy(tracker, idle)[1]:  # a counter sees the rest of the machine, too
        assert spent[1] / spent[0] == pytest.approx(3, rel=0.25)


def test_without_codecarbon_a_stage_says_none_and_the_probe_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    energy.detect.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "codecarbon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with EnergyMeter() as spent:
        pass
    assert spent.record() == {"energy_wh": 0.0, "co2_g": 0.0, "energy_source": "none"}
    with pytest.raises(MissingExtra, match=r"pip install 'winnow\[energy\]'"), EnergyMeter(required=True):
        pass
    energy.detect.cache_clear()


def test_the_users_codecarbon_settings_cannot_make_it_send(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api=true\nsave_to_file=true\nemissions_endpoint=http://127.0.0.1:9\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    tracker = energy._tracker(475.0)
    assert tracker._output_handlers == []
    with EnergyMeter() as spent:
        busy(0.05)
    assert spent.wh > 0
    assert [p.name for p in tmp_path.iterdir()] == [".codecarbon.config"]
