"""The hardware probe: what the model takes on disk and in memory, how fast it answers, and the energy of its answers.

All of it is measured with one workload (`conf/hardware`), after the same warm-up, while the device is held alone. The embedded
model takes about 4 s with `hardware=cpu`.

    python evaluate.py model=nano hardware=cpu hardware.output_tokens=64
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from winnow.hardware import latency
from winnow.hardware.device import Hardware
from winnow.hardware.disturbance import Repeater, Watch
from winnow.hardware.energy import EnergyMeter
from winnow.hardware.footprint import disk_bytes
from winnow.hardware.lock import alone
from winnow.hardware.runtime import Served, serving
from winnow.types import LM, Figures, Run

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Meters:
    """Measures a model on disk, loaded from there, on `hardware`."""

    hardware: Hardware

    def __call__(self, lm: LM, run: Run) -> Figures:
        """Figures by name, each with its source.

        Raises:
            UserError: the device is not there, the workload does not fit the model, or the model is not on disk.
            MissingExtra: codecarbon is not installed, and there is no other energy meter.
        """
        hardware = self.hardware
        hardware.check()
        figures = Figures({"size_bytes": float(disk_bytes(lm))})
        with serving(lm, hardware, run.log) as served:
            latency.check_context(served.context, hardware)
            with alone(hardware.device, run.log), _threads(hardware.threads):
                asked = latency.prompts(
                    served.vocab_size, hardware.latency_batch_size, hardware.prompt_tokens, run.seed
                )
                for _ in range(hardware.warmup):
                    served.request(asked, hardware.output_tokens)
                figures.merge(self.memory(served, asked))
                watch = Watch(hardware.device) if hardware.watch else None
                repeater = Repeater(watch, hardware.retry_seconds, run.log)
                for name, measure in (
                    ("latency", lambda: self.latency(served, asked, run.seed)),
                    ("energy", lambda: self.energy(served, asked)),
                ):
                    found, disturbance = repeater(name, measure)
                    figures.merge(found.disturbed() if disturbance else found)
        return figures

    def memory(self, served: Served, asked: Prompts) -> Figures:
        """`weights_memory_bytes`, and `peak_memory_bytes` while one request is answered."""
        with served.peak_memory() as peak:
            served.request(asked, self.hardware.output_tokens)
        held = served.weights_memory_bytes()
        return Figures({"weights_memory_bytes": float(held), "peak_memory_bytes": float(peak.peak_bytes)})

    def latency(self, served: Served, asked: Prompts, seed: int) -> Figures:
        """Times of requests, with a bootstrap interval of their median."""
        timings = latency.time_requests(served, asked, self.hardware)
        return latency.summarize(timings, self.hardware, seed)

    def energy(self, served: Served, asked: Prompts) -> Figures:
        """Energy and CO2 of 1,000 output tokens, their share of reading the prompts included."""
        hardware = self.hardware
        tokens_a_request = hardware.latency_batch_size * hardware.output_tokens
        requests = math.ceil(hardware.energy_tokens / tokens_a_request)
        with EnergyMeter(hardware.carbon_g_per_kwh, required=True, device=hardware.device) as energy:
            for _ in range(requests):
                served.request(asked, hardware.output_tokens)
        per_1k = 1000 / (requests * tokens_a_request)
        figures = {"energy_wh_per_1k_tokens": energy.wh * per_1k, "co2_g_per_1k_tokens": energy.co2_g * per_1k}
        return Figures(figures, dict.fromkeys(figures, energy.source))


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
