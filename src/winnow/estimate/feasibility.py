"""Whether a pipeline can be made and served on given hardware, before anything is loaded: from the base's configuration alone.

    feasibility(layout_of(lm), {"rtn": RTN()}, hardware, Calibration(), machine.measured(hardware, "bfloat16")).fits

Sizes on disk follow from shapes and are good to 3 %. Memory is estimated, to some 20 % on a processor; time is rough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from winnow.core.errors import UserError
from winnow.core.formats import human
from winnow.core.types import Calibration
from winnow.estimate.cost import StageCost
from winnow.estimate.layout import ModelLayout
from winnow.estimate.machine import DISK_BYTES_PER_S, Machine
from winnow.hardware.device import Hardware

__all__ = ["HEADROOM", "Feasibility", "Step", "feasibility"]

HEADROOM = 0.9  # of the memory: the rest is for the runtime's own buffers and for fragmentation
_SHORTEST = 256  # tokens that a way out still offers
_NARROWER = {8: "", 4: "", 3: "", 2: ""}  # bits of the linear weights that it offers, and what makes them
_IN_TRANSFORMERS = {8: " (int8)", 4: " (nf4)"}  # which transformers computes with; it unpacks anything else to 16 bits
_SCALES = 0.25  # bits a weight: a 16-bit scale for each group of 64


@dataclass(frozen=True)
class Step:
    """A model on its way through a pipeline, and what making it of the one before takes; bytes.

    Attributes:
        name: of the stage; `base` for the first.
        disk_bytes: of all files.
        weights_bytes: in memory, as `hardware.runtime` holds them.
        cache_bytes: keys and values of the served requests, at their longest.
        serving_bytes: all of that, activations and, on a processor, the process itself.
        host_peak_bytes: main memory while it is made: the process, the weights, and what the stage holds beside them.
        device_peak_bytes: the same on a GPU; 0 on a processor.
        seconds: rough, without the start of the process; None where the device's speed is not known.
        reason: why it cannot be made or served, and what would be; empty where it can.
    """

    name: str
    plan: ModelLayout
    disk_bytes: int
    weights_bytes: int
    cache_bytes: int
    serving_bytes: int
    host_peak_bytes: int
    device_peak_bytes: int
    seconds: float | None
    making: str = ""  # why it cannot be made
    serving: str = ""  # why it cannot be served

    @property
    def reason(self) -> str:
        return "; ".join(part for part in (self.making, self.serving) if part)

    @property
    def fits(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Feasibility:
    """A pipeline: the base, then the model after each stage."""

    steps: tuple[Step, ...]

    @property
    def last(self) -> Step:
        return self.steps[-1]

    @property
    def host_peak_bytes(self) -> int:
        return max(step.host_peak_bytes for step in self.steps)

    @property
    def device_peak_bytes(self) -> int:
        return max(step.device_peak_bytes for step in self.steps)

    @property
    def seconds(self) -> float | None:
        known = [step.seconds for step in self.steps if step.seconds is not None]
        return sum(known) if len(known) == len(self.steps) else None

    @property
    def reason(self) -> str:
        """Why the result cannot be had: a stage cannot be run here, or the result not served; empty where it can."""
        parts = [f"{step.name}: {step.making}" for step in self.steps if step.making]
        return "; ".join(parts + ([self.last.serving] if self.last.serving else []))

    @property
    def fits(self) -> bool:
        return not self.reason


class Predicting(Protocol):
    """A stage, as far as it says what it will make and what making it costs."""

    def predict(self, plan: ModelLayout) -> ModelLayout: ...

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost: ...


def feasibility(
    base: ModelLayout, stages: Mapping[str, Predicting], hardware: Hardware, calibration: Calibration, machine: Machine
) -> Feasibility:
    """The base and what each of the stages makes of it, in their order, on this hardware.

    Raises:
        UserError: a stage cannot be applied to a model of this shape, or the hardware's memory is not known.
    """
    if not hardware.memory_bytes():
        raise UserError(
            f"hardware={hardware.name} is not in this machine and its memory not known; set hardware.memory_limit_bytes"
        )
    largest = max(t.numel for t in base.tensors.values())
    # every weight is looked at once, to be known as finite: a tensor at a time, its magnitudes and two masks
    loading = StageCost(traffic_bytes=3 * base.memory_bytes, host_bytes=4 * largest)
    steps = [_step("base", base, base, loading, hardware, machine)]
    plan = base
    for name, stage in stages.items():
        work = stage.work(plan, calibration)
        made = stage.predict(plan)
        steps.append(_step(name, plan, made, work, hardware, machine))
        plan = made
    return Feasibility(tuple(steps))


def _step(
    name: str, before: ModelLayout, plan: ModelLayout, work: StageCost, hardware: Hardware, machine: Machine
) -> Step:
    on_cpu = hardware.device == "cpu"
    # weights are mapped from their file: what a stage changes in place takes no more than what it replaces
    host = machine.process_bytes + before.memory_bytes + work.host_bytes
    device = 0.0
    if on_cpu:
        host += work.device_bytes + work.fragmentation_bytes + machine.kernels_bytes(work)
    else:
        device = work.moved_bytes + work.device_bytes
    seconds = machine.seconds(work)
    written = 0 if name == "base" else plan.disk_bytes
    tokens = hardware.prompt_tokens + hardware.output_tokens
    step = Step(
        name=name,
        plan=plan,
        disk_bytes=plan.disk_bytes,
        weights_bytes=_weights(plan, hardware),
        cache_bytes=_cache(plan, hardware, tokens, hardware.latency_batch_size),
        serving_bytes=_serving(plan, hardware, machine, tokens, hardware.latency_batch_size),
        host_peak_bytes=math.ceil(host),
        device_peak_bytes=math.ceil(device),
        seconds=None if seconds is None else seconds + written / DISK_BYTES_PER_S,
    )
    return dataclasses.replace(
        step, making=_not_made(step, work, hardware, machine), serving=_not_served(step, hardware, machine)
    )


def _weights(plan: ModelLayout, hardware: Hardware, bits: float | None = None) -> int:
    """In memory: transformers unpacks what it has no kernels for, other runtimes compute with what is stored.

    With the linear weights at `bits` instead, where that is given.
    """
    if bits:
        others = sum(t.memory_bytes for t in plan.tensors.values() if not t.linear)
        return others + math.ceil(plan.linear_parameters * (bits + _SCALES) / 8)
    if plan.kind == "gguf" or hardware.runtime != "transformers":
        return plan.weight_bytes
    return plan.served_bytes


def _cache(plan: ModelLayout, hardware: Hardware, tokens: int, batch: int) -> int:
    """Of keys and values when the last token is answered; in a quantized cache the newest ones wait unquantized."""
    n = plan.spec
    if plan.cache_bits is None:
        return n.kv_cache_bytes(tokens, batch)
    waiting = min(plan.cache_residual, hardware.output_tokens, tokens)
    return n.kv_cache_bytes(tokens - waiting, batch, plan.cache_bits) + n.kv_cache_bytes(waiting, batch)


def _serving(
    plan: ModelLayout, hardware: Hardware, machine: Machine, tokens: int, batch: int, bits: float | None = None
) -> int:
    """Bytes to answer `batch` requests of `tokens` at once."""
    n = plan.spec
    process = machine.process_bytes if hardware.device == "cpu" else 0
    return (
        _weights(plan, hardware, bits)
        + _cache(plan, hardware, tokens, batch)
        + n.activation_bytes(tokens, batch)
        + process
    )


def _not_made(step: Step, work: StageCost, hardware: Hardware, machine: Machine) -> str:
    """Why the stage cannot be run: empty if it can, or if nothing is known of the machine that it would run on."""
    host_limit = hardware.memory_bytes() if hardware.device == "cpu" else machine.host_limit
    asked = [(True, step.device_peak_bytes, hardware.memory_bytes()), (False, step.host_peak_bytes, host_limit)]
    for on_gpu, needed, limit in asked:
        if limit is None:
            continue
        usable = HEADROOM * limit
        if needed > usable:
            texts = work.device_bytes + (0 if on_gpu else work.host_bytes)
            if work.flops and needed - texts <= usable:  # what is computed with texts grows with them
                way = "take fewer or shorter texts (calibration.samples, max_length), or smaller batches"
            else:
                way = "take a smaller model or a machine with more memory"
            what = "loading" if step.name == "base" else "making"
            where = "on the GPU" if on_gpu else "of main memory"
            return f"{what} it needs {_size(needed)} {where}, {_size(usable)} usable; {way}"
    return ""


def _not_served(step: Step, hardware: Hardware, machine: Machine) -> str:
    usable = HEADROOM * hardware.memory_bytes()
    if step.serving_bytes <= usable:
        return ""
    batch, tokens = hardware.latency_batch_size, hardware.prompt_tokens + hardware.output_tokens
    return (
        f"serving {batch} x {tokens:,} tokens needs {_size(step.serving_bytes)}, {_size(usable)} usable; "
        f"{_way_out(step.plan, hardware, machine, usable)}"
    )


def _way_out(plan: ModelLayout, hardware: Hardware, machine: Machine, usable: float) -> str:
    """What would be served instead: with fewer bits, one request at a time, a shorter context, in this order."""
    batch, tokens = hardware.latency_batch_size, hardware.prompt_tokens + hardware.output_tokens
    packed = dataclasses.replace(hardware, runtime="vllm")
    if hardware.device == "cuda" and _serving(plan, packed, machine, tokens, batch) <= usable:
        return "transformers unpacks it: it fits with hardware.runtime=vllm, which computes with packed weights"
    possible = _NARROWER if hardware.runtime != "transformers" else _IN_TRANSFORMERS
    narrower = [bits for bits in possible if _weights(plan, hardware, bits) < _weights(plan, hardware)]
    while True:
        for bits in (None, *narrower):
            if _serving(plan, hardware, machine, tokens, batch, bits) <= usable:
                weights = f"at {bits} bits{possible[bits]} " if bits else ""
                return f"it fits {weights}with {batch} x {tokens:,} tokens"
        if batch > 1:
            batch = 1
        elif tokens // 2 >= _SHORTEST:
            tokens //= 2
        else:
            return "no bit width fits: use a smaller model or a larger device"


def _size(size: float) -> str:
    return human("size_bytes", size)
