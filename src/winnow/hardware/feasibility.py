"""Whether a model fits a device, before anything is loaded: pure arithmetic on a `ModelSpec` and a number of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from winnow.model.spec import WIDTHS, ModelSpec, gib

HEADROOM = 0.9  # of the memory: the rest is for the runtime's own buffers and for fragmentation

Work = Literal["run", "train", "lora"]


@dataclass(frozen=True)
class Feasibility:
    """An estimate: `needed_bytes` of the `limit_bytes` there are, and a sentence that says so and names a way out."""

    fits: bool
    needed_bytes: int
    limit_bytes: int
    reason: str


def feasible(
    spec: ModelSpec,
    limit_bytes: int,
    work: Work = "run",
    bits: int = 16,
    context: int | None = None,
    batch: int = 1,
) -> Feasibility:
    """Whether one device of `limit_bytes` (`Hardware.memory_bytes()`) can do the work with this model.

    Args:
        work: `run` answers requests; `train` updates every weight with AdamW, in float32 whatever `bits`; `lora` trains
            adapters over a base of `bits`.
        bits: of the weights, one of `WIDTHS`.
        context: tokens of a sequence; by default all that the model takes, 2,048 at most for training.
        batch: sequences at once, on this device.

    Raises:
        ValueError: `bits` is not one of `WIDTHS`.
    """
    if bits not in WIDTHS:
        raise ValueError(f"bits={bits} is not one of {', '.join(map(str, WIDTHS))}")
    if context is None:
        context = spec.context if work == "run" else min(spec.context, 2048)
    usable = int(HEADROOM * limit_bytes)
    needed = _needed(spec, work, bits, context, batch)
    task = {"run": f"to run at {bits} bits", "train": "to train all weights", "lora": f"LoRA over {bits} bits"}[work]
    sentence = f"{spec.name}, {task}, {batch} x {context:,} tokens: {gib(needed)} needed, {gib(usable)} usable"
    if needed <= usable:
        return Feasibility(True, needed, limit_bytes, f"{sentence} (estimated)")
    return Feasibility(False, needed, limit_bytes, f"{sentence} (estimated); {_way_out(spec, work, context, usable)}")


def _needed(spec: ModelSpec, work: Work, bits: int, context: int, batch: int) -> int:
    if work == "run":
        return spec.memory_to_run(bits, context, batch)
    return spec.memory_to_train("full" if work == "train" else "lora", context, batch, bits)


def _way_out(spec: ModelSpec, work: Work, context: int, usable: int) -> str:
    """What would fit instead: the same work with fewer bits or a shorter context, one sequence at a time."""
    if work == "train":
        return _way_out(spec, "lora", context, usable).replace("it fits", "LoRA fits")
    tokens = context
    while tokens >= 256:
        for bits in (16, 8, 4, 3, 2):
            if _needed(spec, work, bits, tokens, 1) <= usable:
                return f"it fits at {bits} bits with 1 x {tokens:,} tokens"
        tokens //= 2
    return "no bit width fits: use a smaller model or a larger device"
