"""The hardware probe: what the model takes on disk and in memory, how fast it answers, and the energy of its answers.

All of it is measured with one workload (`conf/hardware`), after the same warm-up, while the device is held alone. The embedded
model takes about 4 s with `hardware=cpu`.

    python evaluate.py model=nano hardware=cpu hardware.output_tokens=64
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from winnow.core.types import Figures
from winnow.hardware import counters
from winnow.hardware.device import Hardware
from winnow.hardware.disturbance import Disturbance, Repeater, Watch
from winnow.hardware.energy import EnergyMeter, prepare
from winnow.hardware.footprint import disk_bytes
from winnow.hardware.lock import exclusive_device
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served, in_turn, latency, serving
from winnow.runtime.in_turn import Base
from winnow.runtime.latency import Timing

Request = Callable[[], Timing]
SLOWEST_UPDATE_S = 1.0  # of a GPU's energy counter: one that has not moved by then does not count


@dataclass(frozen=True)
class Meters:
    """Measures a model on disk, loaded from there, on `hardware`.

    Attributes:
        base: the base model, with which a search compares: requests of both are then timed in turn.
    """

    hardware: Hardware
    base: Base | None = None

    def __call__(self, lm: LM, run: Run, served: Served | None = None) -> Figures:
        """Figures by name, each with its source; `served` is the model, where a runtime has it open.

        Raises:
            UserError: the device is not there, the workload does not fit the model, or the model is not on disk.
            MissingExtra: codecarbon is not installed, and there is no other energy meter.
        """
        hardware = self.hardware
        hardware.check()
        figures = Figures({"size_bytes": float(disk_bytes(lm))})
        with serving(lm, hardware, run.log, served) as candidate:
            latency.check_context(candidate.context, hardware)
            with exclusive_device(hardware.device, run.log), _threads(hardware.threads):
                until = time.perf_counter() + hardware.most_seconds
                request = self.request(candidate, run.seed)
                self.warm_up(request, until)
                figures.merge(self.memory(candidate, request))
                watch = Watch(hardware.device, functools.partial(counters.read, devices=hardware.devices))
                repeater = Repeater(watch if hardware.watch else None, hardware.retry_seconds, run.log)
                prepare(
                    hardware.device, hardware.devices
                )  # finding out what the machine is would look like a disturbance
                peak_bytes = figures["peak_memory_bytes"]
                with in_turn.opened(self.base, candidate, peak_bytes, hardware, run.log) as other:
                    theirs = self.request(other, run.seed) if other is not None else None
                    if theirs is not None:
                        self.warm_up(theirs, until)
                    left_s = until - time.perf_counter()
                    _merge(figures, *repeater("latency", lambda: self.latency(request, theirs, left_s, run.seed)))
                _merge(figures, *repeater("energy", lambda: self.energy(request)))
        return figures

    def request(self, served: Served, seed: int) -> Request:
        """Puts one request of the workload."""
        hardware = self.hardware
        asked = latency.prompts(served.vocab_size, hardware.latency_batch_size, hardware.prompt_tokens, seed)
        return lambda: served.request(asked, hardware.output_tokens)

    def warm_up(self, request: Request, until: float) -> None:
        for _ in range(self.hardware.warmup):
            request()
            if time.perf_counter() > until:
                break

    def memory(self, served: Served, request: Request) -> Figures:
        """`weights_memory_bytes`, and `peak_memory_bytes` while one request is answered."""
        with served.peak_memory() as peak:
            request()
        held = served.weights_memory_bytes()
        return Figures({"weights_memory_bytes": float(held), "peak_memory_bytes": float(peak.peak_bytes)})

    def latency(self, request: Request, base: Request | None, most_seconds: float, seed: int) -> Figures:
        """Times of requests, with a bootstrap interval of their median; in turn with those of the base model, if it is there."""
        if base is None:
            (timings,) = latency.time_requests([request], self.hardware, most_seconds)
            return latency.summarize(timings, self.hardware, seed)
        assert self.base is not None
        timings, theirs = latency.time_requests([request, base], self.hardware, most_seconds)
        return in_turn.summarize(timings, theirs, self.base.latency_ms, self.hardware, seed)

    def energy(self, request: Request) -> Figures:
        """Energy and CO2 of 1,000 output tokens, their share of reading the prompts included."""
        hardware = self.hardware
        tokens_a_request = hardware.latency_batch_size * hardware.output_tokens
        meter = EnergyMeter(hardware.carbon_g_per_kwh, hardware.device, hardware.devices, host=False, required=True)
        tokens = 0
        with meter as energy:
            started = time.perf_counter()
            while True:
                request()
                tokens += tokens_a_request
                spent_s = time.perf_counter() - started
                enough = tokens >= hardware.energy_tokens or spent_s >= hardware.energy_seconds
                if enough and (meter.counted() or spent_s >= hardware.energy_seconds + SLOWEST_UPDATE_S):
                    break
        per_1k = 1000 / tokens
        figures = {"energy_wh_per_1k_tokens": energy.wh * per_1k, "co2_g_per_1k_tokens": energy.co2_g * per_1k}
        return Figures(figures, dict.fromkeys(figures, energy.source))


def _merge(figures: Figures, found: Figures, disturbance: Disturbance) -> None:
    figures.merge(found.disturbed() if disturbance else found)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Lets torch use `count` threads meanwhile; None leaves its choice. (llama.cpp has its own, from when it was opened.)"""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
