"""Estimates a training's memory on each device before it starts, and refuses one that cannot fit with options that would.

Weights, gradients, moments and activations are counted on the model as it will be trained, by the formulas of
`winnow.estimate.training_memory`, to within some 20 %. Where memory is short, the plan first turns on activation checkpointing
(Chen et al. 2016, arXiv:1604.06174), then shards the weights over the devices (FSDP), and only then refuses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from winnow.core.errors import UserError
from winnow.core.formats import duration, human
from winnow.estimate.feasibility import HEADROOM
from winnow.estimate.layout import ModelLayout
from winnow.estimate.machine import EFFICIENCY, resident_bytes
from winnow.estimate.training_memory import TrainingMemory
from winnow.hardware.inventory import available_cores, physical_memory_bytes
from winnow.hardware.run import Run
from winnow.model.adapter import base_model
from winnow.training.dist_env import DistEnv

SHORTEST = 64  # the fewest tokens at a time that a refusal still suggests


@dataclass(frozen=True)
class TrainingMemoryPlan:
    """How a training will run.

    Attributes:
        tokens: the most tokens on a device at a time, by the estimate.
        needed_bytes: the memory needed on each device with that many tokens.
        usable_bytes: the usable memory of each device.
        checkpointing: whether activations are recomputed in the backward pass instead of being stored.
        sharded: whether each device holds a part of the weights.
    """

    tokens: int
    needed_bytes: int
    usable_bytes: int
    checkpointing: bool = False
    sharded: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        extras = [", activations recomputed"] if self.checkpointing else []
        extras += [", weights sharded"] if self.sharded else []
        return (
            f"needs about {_size_text(self.needed_bytes)} of {_size_text(self.usable_bytes)} usable on each device with "
            f"{self.tokens:,} tokens at a time{''.join(extras)}; roughly {duration(self.seconds)}"
        )


def training_memory(model: Any, run: Run, mixed: bool, other_models: Sequence[nn.Module] = ()) -> TrainingMemory:
    """Counts the memory of training a causal language model of transformers, with or without a PEFT wrapper."""
    from winnow.model.layers import decoder_blocks, linears

    base = base_model(model)
    block_bytes = [sum(p.nbytes for p in block.parameters()) for block in decoder_blocks(base)]
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    buffer_bytes = sum(b.nbytes for b in model.buffers())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    linear_weights = [module.weight for module in linears(base).values() if module.weight.is_floating_point()]
    head = base.get_output_embeddings().weight
    cast_weights = [weight for weight in (*linear_weights, head) if weight.element_size() == 4]
    other_bytes = {id(p): p.nbytes for other in other_models for p in other.parameters()}
    return TrainingMemory(
        spec=ModelLayout(base.config, {}).spec,
        # an adapter over a pruned matrix computes the masked matrix in single precision
        weights_bytes=parameter_bytes + 5 * buffer_bytes,
        gathered_bytes=2 * max(block_bytes, default=0) + parameter_bytes - sum(block_bytes),
        cast_parameters=sum(weight.numel() for weight in cast_weights) if mixed else 0,
        trainable_parameters=trainable,
        other_models_bytes=sum(other_bytes.values()),
        mixed=mixed,
        adapters=trainable < parameters,
        on_cpu=run.device == "cpu",
    )


def usable_bytes(run: Run, world: DistEnv) -> int:
    """Returns the usable memory of one device: its limit minus the headroom. The processes of a CPU share its memory."""
    if run.device == "cpu":
        limit = run.memory_limit_bytes or physical_memory_bytes() // world.local_size
        return math.floor(HEADROOM * limit)
    import torch

    total_memory = torch.cuda.get_device_properties(world.local_rank).total_memory
    return math.floor(HEADROOM * min(run.memory_limit_bytes or total_memory, total_memory))


def plan_training(
    memory: TrainingMemory,
    run: Run,
    world: DistEnv,
    *,
    tokens_per_device: int,
    share: int,
    longest: int,
    total_tokens: float,
    usable: int | None = None,
) -> TrainingMemoryPlan:
    """Returns how the training will run on these devices.

    Args:
        tokens_per_device: the requested tokens at a time; 0 takes as many as fit.
        share: the tokens of an optimizer step that each device takes.
        longest: tokens of the longest document, which cannot be split into two batches.
        total_tokens: tokens of the whole training.

    Raises:
        UserError: the training cannot fit; the message says what would fit.
    """
    usable = usable if usable is not None else usable_bytes(run, world)
    process_bytes = (
        0 if run.device != "cpu" else max(0, resident_bytes() - memory.weights_bytes - memory.other_models_bytes)
    )
    available = usable - process_bytes
    most = max(longest, min(tokens_per_device or share, share))
    least = most if tokens_per_device else max(longest, min(share, SHORTEST))
    shardable = can_shard(memory)
    shard_counts = [1] if run.parallel == "ddp" or world.size == 1 or not shardable else [1, world.size]
    if run.parallel == "fsdp" and world.size > 1:
        if not shardable:
            raise UserError(
                "hardware.parallel=fsdp spreads dense weights over the devices, and these are quantized; set hardware.parallel=ddp"
            )
        shard_counts = [world.size]
    for shards in shard_counts:
        for checkpointing in (False, True):
            if memory.needed_bytes(least, checkpointing, shards) > available:
                continue
            tokens = most
            while tokens > least and memory.needed_bytes(tokens, checkpointing, shards) > available:
                tokens = max(least, tokens // 2)
            needed = process_bytes + memory.needed_bytes(tokens, checkpointing, shards)
            seconds = _seconds(memory, run, world, total_tokens, checkpointing)
            return TrainingMemoryPlan(tokens, needed, usable, checkpointing, shards > 1, seconds)
    needed = process_bytes + memory.needed_bytes(least, True, shard_counts[-1])
    raise UserError(
        f"training needs about {_size_text(needed)} on each device with {least:,} tokens at a time, and "
        f"{_size_text(usable)} are usable; "
        f"{_fitting_options(memory, available, least, world, shardable)}"
    )


def can_shard(memory: TrainingMemory) -> bool:
    """Returns whether the weights can be sharded.

    Quantized weights, which take fewer bytes than half precision, are stored in formats that cannot be sharded.
    """
    return memory.weights_bytes >= 2 * memory.spec.parameters


def _fitting_options(memory: TrainingMemory, available: float, least: int, world: DistEnv, shardable: bool) -> str:
    """Returns the part of a refusal that says which settings would fit into `available` bytes."""
    for checkpointing, shards in ((True, 1), (True, world.size)):
        fewer = _max_tokens(memory, available, least // 2, checkpointing, shards)
        if fewer:
            shorter = f"method.<name>.max_length={fewer} and tokens_per_device={fewer}"
            return f"it fits with {shorter}" + (" and hardware.parallel=fsdp" if shards > world.local_size == 1 else "")
    options = []
    if shardable:
        quantized = dataclasses.replace(
            memory,
            weights_bytes=math.ceil(memory.weights_bytes * 4.5 / 32),
            cast_parameters=0,
            trainable_parameters=min(memory.trainable_parameters, _lora_parameters(memory)),
        )
        if quantized.needed_bytes(SHORTEST, True) <= available:
            options.append("method=[qlora], which keeps the weights at 4 bits")
        for devices in (2, 4, 8, 16, 32, 64):
            if devices > world.size and memory.needed_bytes(SHORTEST, True, devices) <= available:
                options.append(f"{devices} such devices with hardware.parallel=fsdp")
                break
    return f"it fits with {', or '.join(options)}" if options else "take a smaller model, or devices with more memory"


def _max_tokens(memory: TrainingMemory, available: float, share: int, checkpointing: bool, shards: int) -> int:
    """Returns the most tokens at a time, out of `share`, that fit into `available` bytes; 0 if none do."""
    tokens = share
    while tokens >= SHORTEST and memory.needed_bytes(tokens, checkpointing, shards) > available:
        tokens //= 2
    return tokens if memory.needed_bytes(tokens, checkpointing, shards) <= available else 0


def _lora_parameters(memory: TrainingMemory) -> int:
    """Returns the number of parameters of a LoRA of rank 16."""
    return 16 * memory.spec.lora_width


def _seconds(
    memory: TrainingMemory, run: Run, world: DistEnv, total_tokens: float, checkpointing: bool
) -> float | None:
    """Estimates the training time; None if the device's speed is unknown.

    A token takes two operations per weight for the forward pass, two for the gradient of the inputs, and two per trainable
    parameter for its gradient.
    """
    flops = run.tflops * 1e12 if run.tflops else _cpu_flops(memory.mixed) if run.device == "cpu" else None
    if not flops:
        return None
    per_token = 2 * ((3 if checkpointing else 2) * memory.spec.parameters + memory.trainable_parameters)
    cores = 1.0 if run.device != "cpu" else max(1.0, world.local_size / available_cores())  # processes that share cores
    return total_tokens * per_token / (EFFICIENCY * flops * world.size / cores)


@functools.cache
def _cpu_flops(mixed: bool) -> float:
    """Measures the operations per second of this machine's matrix products, once per process."""
    import torch

    from winnow.estimate.machine import product_flops

    return product_flops(torch.bfloat16 if mixed else torch.float32)


def _size_text(size_bytes: float) -> str:
    return human("size_bytes", size_bytes)
