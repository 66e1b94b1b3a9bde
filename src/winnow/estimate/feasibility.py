"""Predicts whether a pipeline can be made and served on given hardware, from the base model's configuration alone.

    machine = measure_machine(hardware, "bfloat16")
    feasibility(layout_of(lm), {"rtn": RTN()}, hardware, Calibration(), machine).fits

Sizes on disk follow from shapes and are accurate to 3 %. Memory is estimated, to some 20 % on a processor; time is rough.
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

HEADROOM = 0.9  # usable share of the memory; the rest is for buffers of the runtime and for fragmentation
_MIN_TOKENS = 256  # the shortest context that a way out suggests
_BITS = {8: "", 4: "", 3: "", 2: ""}  # bits of the linear weights that it suggests, and the method that makes them
# the formats that transformers computes with; it unpacks all others to 16 bits
_BITS_IN_TRANSFORMERS = {8: " (int8)", 4: " (nf4)"}
_SCALE_BITS = 0.25  # bits a weight for a 16-bit scale in each group of 64


@dataclass(frozen=True)
class Step:
    """A model within a pipeline, and the resources for making it from the previous one; sizes are in bytes.

    Attributes:
        name: name of the stage; `base` for the first step.
        disk_bytes: size of all files.
        weights_bytes: size of the weights in memory, in `hardware.runtime`.
        cache_bytes: keys and values of the served requests, at their full length.
        serving_bytes: total while serving: weights, KV cache, activations and, on a processor, the process itself.
        host_peak_bytes: main memory while it is made: the process, the weights, and the extra memory of the stage.
        device_peak_bytes: the same on a GPU; 0 on a processor.
        seconds: rough time without the start of the process; None where the device's speed is not known.
        reason: why it cannot be made or served, and what could be done instead; empty where it can.
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
    making_problem: str = ""  # why it cannot be made
    serving_problem: str = ""  # why it cannot be served

    @property
    def reason(self) -> str:
        return "; ".join(part for part in (self.making_problem, self.serving_problem) if part)

    @property
    def fits(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Feasibility:
    """The forecast of a pipeline: a step for the base model, and one for the model after each stage."""

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
        step_seconds = [step.seconds for step in self.steps if step.seconds is not None]
        return sum(step_seconds) if len(step_seconds) == len(self.steps) else None

    @property
    def reason(self) -> str:
        """Why the pipeline fails: a stage cannot run here, or its result cannot be served; empty if neither."""
        parts = [f"{step.name}: {step.making_problem}" for step in self.steps if step.making_problem]
        return "; ".join(parts + ([self.last.serving_problem] if self.last.serving_problem else []))

    @property
    def fits(self) -> bool:
        return not self.reason


class PredictableStage(Protocol):
    """A stage that predicts its result and its cost."""

    def predict(self, plan: ModelLayout) -> ModelLayout: ...

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost: ...


def feasibility(
    base: ModelLayout,
    stages: Mapping[str, PredictableStage],
    hardware: Hardware,
    calibration: Calibration,
    machine: Machine,
) -> Feasibility:
    """Predicts the base model and the result of each stage, in order, on this hardware.

    Raises:
        UserError: a stage cannot be applied to a model of this shape, or the hardware's memory is not known.
    """
    if not hardware.memory_bytes():
        raise UserError(
            f"hardware={hardware.name} is not in this machine and its memory not known; set hardware.memory_limit_bytes"
        )
    largest = max(t.numel for t in base.tensors.values())
    # Loading checks that every weight is finite, a tensor at a time, with its magnitudes and two masks.
    loading = StageCost(traffic_bytes=3 * base.memory_bytes, host_bytes=4 * largest)
    steps = [_step("base", base, base, loading, hardware, machine)]
    plan = base
    for name, stage in stages.items():
        work = stage.work(plan, calibration)
        next_plan = stage.predict(plan)
        steps.append(_step(name, plan, next_plan, work, hardware, machine))
        plan = next_plan
    return Feasibility(tuple(steps))


def _step(
    name: str, before: ModelLayout, plan: ModelLayout, work: StageCost, hardware: Hardware, machine: Machine
) -> Step:
    on_cpu = hardware.device == "cpu"
    # Weights are mapped from their file, so a stage that changes them in place needs no extra memory for them.
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
        weights_bytes=_weights_bytes(plan, hardware),
        cache_bytes=_cache_bytes(plan, hardware, tokens, hardware.latency_batch_size),
        serving_bytes=_serving_bytes(plan, hardware, machine, tokens, hardware.latency_batch_size),
        host_peak_bytes=math.ceil(host),
        device_peak_bytes=math.ceil(device),
        seconds=None if seconds is None else seconds + written / DISK_BYTES_PER_S,
    )
    return dataclasses.replace(
        step,
        making_problem=_making_problem(step, work, hardware, machine),
        serving_problem=_serving_problem(step, hardware, machine),
    )


def _weights_bytes(plan: ModelLayout, hardware: Hardware, bits: float | None = None) -> int:
    """Returns the bytes of the weights in memory; transformers unpacks formats without kernels, other runtimes do not.

    If `bits` is given, the linear weights have that many bits instead.
    """
    if bits:
        other_bytes = sum(t.memory_bytes for t in plan.tensors.values() if not t.linear)
        return other_bytes + math.ceil(plan.linear_parameters * (bits + _SCALE_BITS) / 8)
    if plan.kind == "gguf" or hardware.runtime != "transformers":
        return plan.weight_bytes
    return plan.served_bytes


def _cache_bytes(plan: ModelLayout, hardware: Hardware, tokens: int, batch: int) -> int:
    """Returns the bytes of keys and values at the last token; the newest tokens of a quantized cache are still unquantized."""
    spec = plan.spec
    if plan.cache_bits is None:
        return spec.kv_cache_bytes(tokens, batch)
    unquantized_tokens = min(plan.cache_residual, hardware.output_tokens, tokens)
    return spec.kv_cache_bytes(tokens - unquantized_tokens, batch, plan.cache_bits) + spec.kv_cache_bytes(
        unquantized_tokens, batch
    )


def _serving_bytes(
    plan: ModelLayout, hardware: Hardware, machine: Machine, tokens: int, batch: int, bits: float | None = None
) -> int:
    """Returns the bytes needed to answer `batch` requests of `tokens` at once."""
    spec = plan.spec
    process = machine.process_bytes if hardware.device == "cpu" else 0
    return (
        _weights_bytes(plan, hardware, bits)
        + _cache_bytes(plan, hardware, tokens, batch)
        + spec.activation_bytes(tokens, batch)
        + process
    )


def _making_problem(step: Step, work: StageCost, hardware: Hardware, machine: Machine) -> str:
    """Returns why the stage cannot run; empty if it can, or if nothing is known of the machine that it would run on."""
    host_limit = hardware.memory_bytes() if hardware.device == "cpu" else machine.host_limit
    checks = [(True, step.device_peak_bytes, hardware.memory_bytes()), (False, step.host_peak_bytes, host_limit)]
    for on_gpu, needed, limit in checks:
        if limit is None:
            continue
        usable = HEADROOM * limit
        if needed > usable:
            text_bytes = work.device_bytes + (0 if on_gpu else work.host_bytes)
            if work.flops and needed - text_bytes <= usable:  # memory for calibration texts grows with them
                way_out = "take fewer or shorter texts (calibration.samples, max_length), or smaller batches"
            else:
                way_out = "take a smaller model or a machine with more memory"
            action = "loading" if step.name == "base" else "making"
            memory_name = "on the GPU" if on_gpu else "of main memory"
            return f"{action} it needs {_size(needed)} {memory_name}, {_size(usable)} usable; {way_out}"
    return ""


def _serving_problem(step: Step, hardware: Hardware, machine: Machine) -> str:
    usable = HEADROOM * hardware.memory_bytes()
    if step.serving_bytes <= usable:
        return ""
    batch, tokens = hardware.latency_batch_size, hardware.prompt_tokens + hardware.output_tokens
    return (
        f"serving {batch} x {tokens:,} tokens needs {_size(step.serving_bytes)}, {_size(usable)} usable; "
        f"{_way_out(step.plan, hardware, machine, usable)}"
    )


def _way_out(plan: ModelLayout, hardware: Hardware, machine: Machine, usable: float) -> str:
    """Returns what could be served instead: fewer bits, one request at a time, then a shorter context."""
    batch, tokens = hardware.latency_batch_size, hardware.prompt_tokens + hardware.output_tokens
    with_vllm = dataclasses.replace(hardware, runtime="vllm")
    if hardware.device == "cuda" and _serving_bytes(plan, with_vllm, machine, tokens, batch) <= usable:
        return "transformers unpacks it: it fits with hardware.runtime=vllm, which computes with packed weights"
    options = _BITS if hardware.runtime != "transformers" else _BITS_IN_TRANSFORMERS
    smaller_bits = [bits for bits in options if _weights_bytes(plan, hardware, bits) < _weights_bytes(plan, hardware)]
    while True:
        for bits in (None, *smaller_bits):
            if _serving_bytes(plan, hardware, machine, tokens, batch, bits) <= usable:
                weights = f"at {bits} bits{options[bits]} " if bits else ""
                return f"it fits {weights}with {batch} x {tokens:,} tokens"
        if batch > 1:
            batch = 1
        elif tokens // 2 >= _MIN_TOKENS:
            tokens //= 2
        else:
            return "no bit width fits: use a smaller model or a larger device"


def _size(size: float) -> str:
    return human("size_bytes", size)
