"""What disturbs a measurement is noticed from the counters, in words; disturbed measurements are repeated, and marked at last.

The readings are recorded ones: of the embedded model's requests on two cores, beside programs that use a core each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from winnow.core.types import Figures, Trial
from winnow.hardware import counters, disturbance
from winnow.hardware.counters import Counters, GpuCounters
from winnow.hardware.device import Hardware
from winnow.hardware.disturbance import Disturbance, Repeater, Watch, find_disturbance
from winnow.hardware.inventory import Gpu
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import meters
from winnow.runtime.meters import Meters

START = Counters(wall_s=0.0, waited_s={1: 0.0}, pressure_s=0.0, throttled_s=0.0, stolen_s={"cpu0": 0.0}, busy_s=0.0)


def reading(thread: float, process: float, waited: float, pressure: float, others: float, **more: Any) -> Counters:
    """After a second: processor time of the thread and the process, and what else was counted."""
    settings = {"throttled_s": 0.0, "stolen_s": {"cpu0": 0.0}, **more}
    return Counters(1.0, thread, process, {1: waited}, pressure, busy_s=process + others, **settings)


IDLE = reading(0.99, 0.99, 0.001, 0.002, 0.02)


@pytest.mark.parametrize(
    ("after", "share"),
    [
        (IDLE, 0),
        (reading(0.98, 0.98, 0.015, 0.011, 1.01), 0),  # the other program has a core to itself: latency as before
        (reading(0.60, 0.60, 0.403, 0.502, 1.40), 0.403),
        (reading(1.00, 1.98, 0.008, 0.020, 0.02), 0),
        (reading(0.63, 1.25, 0.368, 0.498, 0.74), 0.37),
        (reading(0.49, 0.99, 0.504, 0.997, 1.02), 0.51),
        (reading(0.50, 1.99, 0.70, 0.99, 0.00), 0),  # eight threads of its own: they wait for one another
        (reading(0.55, 0.55, 0.001, 0.002, 0.10), 0.45),  # its memory is swapped
        (reading(0.95, 0.95, 0.001, 0.002, 0.0, throttled_s=0.8), 0.4),
        (reading(0.95, 0.95, 0.001, 0.002, 0.0, stolen_s={"cpu0": 0.01}), 0),
        (reading(0.95, 0.95, 0.001, 0.002, 0.0, stolen_s={"cpu0": 0.21}), 0.2),
    ],
)
def test_recorded_readings_are_judged_as_the_latency_suffered(after: Counters, share: float) -> None:
    found = find_disturbance(START, after, "cpu", cores=2)
    assert found.share == pytest.approx(share) and bool(found.description) == (share > 0)


def test_the_words_have_the_figures() -> None:
    found = find_disturbance(START, reading(0.60, 0.60, 0.403, 0.502, 1.40), "cpu", cores=2)
    assert found.description == (
        "a thread was ready and waited for a core 40% of the time (other programs used 1.4 of 2 cores); "
        "the process had a core 60% of the time"
    )


def test_a_thread_that_was_not_there_before_counts_too() -> None:
    after = replace(IDLE, waited_s={1: 0.0, 7: 0.5}, busy_s=2.0)
    assert find_disturbance(START, after, "cpu", cores=2).share == 0.5


def test_without_waiting_times_pressure_counts_and_without_that_processor_time() -> None:
    busy = replace(reading(0.60, 0.60, 0.0, 0.502, 1.40), waited_s=None)
    assert find_disturbance(START, busy, "cuda", cores=2).share == pytest.approx(0.502)
    assert find_disturbance(START, replace(busy, pressure_s=0.0), "cpu", cores=2).share == pytest.approx(0.4)
    nothing = Counters(1.0, 0.99, 0.99)  # macOS, say
    assert not find_disturbance(Counters(0.0), nothing, "cpu", cores=2)
    # a thread that waits for the GPU may sleep
    assert not find_disturbance(Counters(0.0), Counters(1.0, 0.2, 0.2), "cuda", cores=2)


def test_the_kernels_files_are_read_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "proc/self/task/11/schedstat": "5000000 2000000000 7\n",
        "proc/self/task/12/schedstat": "5000000 500000000 7\n",
        "proc/pressure/cpu": "some avg10=1.54 avg60=2.21 avg300=1.07 total=6475896\nfull avg10=0 total=0\n",
        "proc/self/cgroup": "0::/user.slice/winnow\n",
        "sys/fs/cgroup/user.slice/winnow/cpu.stat": "usage_usec 9\nnr_throttled 3\nthrottled_usec 1500000\n",
        "proc/stat": "cpu  30 0 30 900 0 0 0 70 0 0\ncpu0 10 0 10 300 5 1 2 20 0 0\ncpu1 20 0 20 600 0 0 0 50 0 0\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(counters.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    found = counters.read("cpu", root=tmp_path)
    assert found.waited_s == {11: 2.0, 12: 0.5}
    assert found.pressure_s == pytest.approx(6.475896) and found.throttled_s == 1.5
    assert found.stolen_s == {"cpu0": pytest.approx(0.2)} and found.busy_s == pytest.approx(0.23)


def test_what_is_not_there_says_nothing(tmp_path: Path) -> None:
    found = counters.read("cpu", root=tmp_path)
    assert (found.waited_s, found.pressure_s, found.throttled_s, found.stolen_s, found.busy_s) == (None,) * 5
    assert not find_disturbance(
        found, replace(found, wall_s=found.wall_s + 1, thread_cpu_s=found.thread_cpu_s + 1), "cpu", cores=2
    )


class Nvml:
    """Stands in for NVML: one GPU, with what the test says of it; a question without an answer is an error."""

    class NVMLError(Exception): ...

    NVML_CLOCK_SM = 1

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, question: str) -> Any:
        if question not in self.answers:
            raise AttributeError(question)

        def asked(*arguments: Any) -> Any:
            answer = self.answers[question]
            if isinstance(answer, type):
                raise answer
            return answer

        return asked


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def answers(**answers: Any) -> GpuCounters:
        always = {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetHandleByUUID": "handle"}
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(**always, **answers))
        monkeypatch.setattr(counters, "used_gpus", lambda *_: (Gpu("H200", "GPU-1", 1),))
        (found,) = counters.read("cuda", since_epoch_s=1.0).gpus
        return found

    yield answers


def test_other_processes_on_the_gpu_and_a_clock_that_is_held_down_are_noticed(gpu: Any) -> None:
    samples = [SimpleNamespace(pid=pid, smUtil=use) for pid, use in ((10, 60), (10, 80), (11, 30), (12, 5))]
    found = gpu(
        nvmlDeviceGetProcessUtilization=samples,
        nvmlDeviceGetCurrentClocksEventReasons=0x40 | 0x04 | 0x01,
        nvmlDeviceGetClockInfo=1200,
    )
    assert found == GpuCounters("H200", {10: 0.7, 11: 0.3, 12: 0.05}, ("it is too hot (hardware)",), 1200)
    after = replace(IDLE, gpus=(found,))
    words = find_disturbance(START, after, "cuda", 2, process=10, fastest_mhz={"H200": 1980}).description
    assert words == (
        "2 other processes used 35% of the H200; the clock of the H200 is held down: it is too hot (hardware)"
    )
    # in a container the process has another id there: the busiest is taken for this one
    assert find_disturbance(START, after, "cuda", 2, process=1).description.startswith("2 other processes used 35%")
    slow = replace(IDLE, gpus=(replace(found, process_shares={10: 0.7}, slowdowns=()),))
    assert find_disturbance(START, slow, "cuda", 2, 10, {"H200": 1980}).share == pytest.approx(0.39, abs=0.01)
    assert not find_disturbance(START, slow, "cuda", 2, 10, {"H200": 1300})


def test_a_power_cap_and_questions_without_an_answer_say_nothing(gpu: Any) -> None:
    found = gpu(
        nvmlDeviceGetProcessUtilization=Nvml.NVMLError,  # a slice of a GPU
        nvmlDeviceGetCurrentClocksThrottleReasons=0x04,  # by its name before driver 535
        nvmlDeviceGetClockInfo=Nvml.NVMLError,
    )
    assert found == GpuCounters("H200")
    assert not find_disturbance(START, replace(IDLE, gpus=(found,)), "cuda", 2)


class Recorded(Watch):
    """Tells of one measurement after another what is given."""

    def __init__(self, *shares: float) -> None:
        super().__init__("cpu", lambda *arguments: START)
        self.shares = iter(shares)

    def __exit__(self, *error: Any) -> None:
        share = next(self.shares)
        self.disturbance = Disturbance(share, "a busy program" if share else "")


@pytest.mark.parametrize(
    ("shares", "seconds", "kept", "disturbed"),
    [
        ((0.0,), 60, 0, False),
        ((0.4, 0.0), 60, 1, False),
        ((0.4, 0.2, 0.3, 0.6), 60, 1, True),  # four times, no more: the least disturbed one is kept
        ((0.4,), 0, 0, True),  # no time to do it again
        ((0.4, 0.3), 0.9, 1, True),  # time for one short pause
    ],
)
def test_what_is_disturbed_is_measured_again_for_a_while(
    shares: tuple[float, ...], seconds: float, kept: int, disturbed: bool, log_lines: list[str]
) -> None:
    pauses: list[float] = []
    repeater = Repeater(Recorded(*shares), seconds, pauses.append)
    results = iter(range(10))
    result, found = repeater("latency", lambda: next(results))
    assert result == kept and bool(found) == disturbed
    assert pauses == list(disturbance.PAUSES_S[: len(shares) - 1])
    assert [line for line in log_lines if line.startswith("latency: marked")] == (
        ["latency: marked as disturbed (a busy program)"] if disturbed else []
    )


def test_marked_figures_keep_where_they_come_from(
    folder: Path, hardware: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(meters, "Watch", lambda *_: Recorded(0.4, 0.0))  # latency, then energy
    watched = replace(hardware, watch=True, retry_seconds=0)
    figures = Meters(watched)(LM(folder), Run(tmp_path))
    assert figures.sources["latency_ms"] == figures.sources["decode_tokens_per_s"] == "measured, disturbed"
    assert figures.sources["peak_memory_bytes"] == "measured"
    assert figures.sources["energy_wh_per_1k_tokens"] in ("counter", "estimated")
    assert log_lines == ["latency: marked as disturbed (a busy program)"]
    trial = Trial(0, strategy=None, figures=figures, sources=figures.sources)  # type: ignore[arg-type]
    assert trial.disturbed("latency_ms") and not trial.disturbed("size_bytes")


def test_the_source_of_an_estimate_stays() -> None:
    assert Figures({"co2_g": 1.0}, {"co2_g": "estimated"}).disturbed().sources == {"co2_g": "estimated, disturbed"}
