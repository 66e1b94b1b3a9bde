"""Measures an artifact's size on disk and in memory, its latency, and the energy of its answers.

Everything is measured with one workload (`conf/hardware`), after the same warm-up, while the device is held exclusively. The
embedded model takes about 4 s with `hardware=cpu`.

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
# longest wait for an update of a GPU's energy counter; a counter that has not changed by then is ignored
SLOWEST_UPDATE_S = 1.0


@dataclass(frozen=True)
class Meters:
    """Measures a model on disk, loaded from there, on `hardware`.

    Attributes:
        base: the base model that a search compares with; requests of both models are then timed in turn.
    """

    hardware: Hardware
    base: Base | None = None

    def __call__(self, lm: LM, run: Run, served: Served | None = None) -> Figures:
        """Returns figures by name, each with its source; `served` is the open model, if a runtime has opened it.

        Raises:
            UserError: the device is not available, the workload does not fit the model, or the model is not on disk.
            MissingExtra: codecarbon is not installed, and there is no other energy meter.
        """
        hardware = self.hardware
        hardware.check()
        figures = Figures({"size_bytes": float(disk_bytes(lm))})
        with serving(lm, hardware, served) as candidate:
            latency.check_context(candidate.context, hardware)
            with exclusive_device(hardware.device), _threads(hardware.threads):
                deadline = time.perf_counter() + hardware.most_seconds
                request = self.request(candidate, run.seed)
                self.warm_up(request, deadline)
                figures.merge(self.memory(candidate, request))
                watch = Watch(hardware.device, functools.partial(counters.read, devices=hardware.devices))
                repeater = Repeater(watch if hardware.watch else None, hardware.retry_seconds)
                # hardware detection during the measurement would look like a disturbance
                prepare(hardware.device, hardware.devices)
                peak_bytes = figures["peak_memory_bytes"]
                with in_turn.open_base(self.base, candidate, peak_bytes, hardware) as served_base:
                    base_request = self.request(served_base, run.seed) if served_base is not None else None
                    if base_request is not None:
                        self.warm_up(base_request, deadline)
                    left_s = deadline - time.perf_counter()
                    _merge(figures, *repeater("latency", lambda: self.latency(request, base_request, left_s, run.seed)))
                _merge(figures, *repeater("energy", lambda: self.energy(request)))
        return figures

    def request(self, served: Served, seed: int) -> Request:
        """Returns a function that makes one request of the workload."""
        hardware = self.hardware
        prompts = latency.random_prompts(served.vocab_size, hardware.latency_batch_size, hardware.prompt_tokens, seed)
        return lambda: served.request(prompts, hardware.output_tokens)

    def warm_up(self, request: Request, deadline: float) -> None:
        for _ in range(self.hardware.warmup):
            request()
            if time.perf_counter() > deadline:
                break

    def memory(self, served: Served, request: Request) -> Figures:
        """Measures `weights_memory_bytes`, and `peak_memory_bytes` while one request is answered."""
        with served.peak_memory() as peak:
            request()
        weights_bytes = served.weights_memory_bytes()
        return Figures({"weights_memory_bytes": float(weights_bytes), "peak_memory_bytes": float(peak.peak_bytes)})

    def latency(self, request: Request, base_request: Request | None, most_seconds: float, seed: int) -> Figures:
        """Times requests, in turn with the base model's if there is one, with a bootstrap interval of their median."""
        if base_request is None:
            (timings,) = latency.time_requests([request], self.hardware, most_seconds)
            return latency.summarize(timings, self.hardware, seed)
        assert self.base is not None
        timings, base_timings = latency.time_requests([request, base_request], self.hardware, most_seconds)
        return in_turn.summarize(timings, base_timings, self.base.latency_ms, self.hardware, seed)

    def energy(self, request: Request) -> Figures:
        """Meters the energy and CO2 of 1,000 output tokens, including their share of reading the prompts."""
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
                if enough and (meter.has_update() or spent_s >= hardware.energy_seconds + SLOWEST_UPDATE_S):
                    break
        per_1k = 1000 / tokens
        figures = {"energy_wh_per_1k_tokens": energy.wh * per_1k, "co2_g_per_1k_tokens": energy.co2_g * per_1k}
        return Figures(figures, dict.fromkeys(figures, energy.source))


def _merge(figures: Figures, new_figures: Figures, disturbance: Disturbance) -> None:
    figures.merge(new_figures.disturbed() if disturbance else new_figures)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads for a block; None keeps it. (llama.cpp has its own number, set when it was opened.)"""
    import torch

    previous_count = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous_count)
