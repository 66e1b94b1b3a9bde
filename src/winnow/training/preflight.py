"""What a training will take of each device, estimated before it starts; one that cannot fit is refused with what would.

Weights, gradients, moments and activations are counted on the model as it will be trained, by the formulas of
`winnow.estimate.cost`; good to some 20 %. Where memory is short, activations are computed a second time in the backward pass
(Chen et al. 2016, arXiv:1604.06174), and the weights spread over the devices (FSDP), before anything is refused.
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
from winnow.estimate.cost import activations, heap_holes
from winnow.estimate.feasibility import HEADROOM
from winnow.estimate.layout import ModelLayout
from winnow.estimate.machine import EFFICIENCY, resident_bytes
from winnow.hardware.inventory import available_cores, physical_memory_bytes
from winnow.hardware.run import Run
from winnow.model.adapter import base_model
from winnow.model.spec import ModelSpec
from winnow.training.dist_env import DistEnv

SHORTEST = 64  # tokens at a time that a way out still offers


@dataclass(frozen=True)
class TrainingMemory:
    """What a training takes of one device.

    Attributes:
        spec: the model's numbers.
        weights_bytes: of all parameters and buffers, as they are stored.
        largest_bytes: of the largest block and of what lies outside the blocks: whole at a time where weights are sharded.
        copied: parameters that are cast to 16 bits for products.
        trained: parameters that need a gradient.
        others_bytes: of other models that take part, as a teacher.
    """

    spec: ModelSpec
    weights_bytes: int
    largest_bytes: int
    copied: int
    trained: int
    others_bytes: int = 0
    mixed: bool = True
    adapters: bool = True
    on_cpu: bool = False

    def needed(self, tokens: int, checkpointing: bool = False, shards: int = 1) -> int:
        """Bytes on each of `shards` devices with `tokens` tokens on it at a time."""
        layers, loss = activations(self.spec, tokens, self.mixed, self.adapters, checkpointing)
        states = 12 * self.trained / shards  # a gradient and two moments
        if shards > 1:
            weights = max(self.weights_bytes, 4 * self.spec.parameters) / shards + self.largest_bytes * (
                1.5 if self.mixed else 1.0
            )
            copies = 0.0
        else:
            weights, copies = float(self.weights_bytes), 2.0 * self.copied
        holes = heap_holes(layers + loss + copies, self.mixed, self.adapters) if self.on_cpu else 0.0
        return math.ceil(weights + self.others_bytes + states + copies + layers + loss + holes)

    def most(self, usable: float, share: int, checkpointing: bool, shards: int) -> int:
        """The most tokens at a time that fit, of a step's share; 0 if none do."""
        tokens = share
        while tokens >= SHORTEST and self.needed(tokens, checkpointing, shards) > usable:
            tokens //= 2
        return tokens if self.needed(tokens, checkpointing, shards) <= usable else 0


@dataclass(frozen=True)
class TrainingMemoryPlan:
    """How a training will run.

    Attributes:
        tokens: that lie on a device at a time, at most, as far as the estimate goes.
        needed_bytes: on each device, with these.
        usable_bytes: of each device's memory.
        checkpointing: activations are computed a second time instead of being kept.
        sharded: each device holds a part of the weights.
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
            f"needs about {_size(self.needed_bytes)} of {_size(self.usable_bytes)} usable on each device with "
            f"{self.tokens:,} tokens at a time{''.join(extras)}; roughly {duration(self.seconds)}"
        )


def demand(model: Any, run: Run, mixed: bool, others: Sequence[nn.Module] = ()) -> TrainingMemory:
    """Counted on a causal language model of transformers, bare or wrapped by PEFT, as it will be trained."""
    from winnow.model.layers import decoder_blocks, linears

    base = base_model(model)
    in_blocks = [sum(p.nbytes for p in block.parameters()) for block in decoder_blocks(base)]
    everything = sum(p.nbytes for p in model.parameters())
    masks = sum(b.nbytes for b in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    products = [module.weight for module in linears(base).values() if module.weight.is_floating_point()]
    head = base.get_output_embeddings().weight
    narrowed = [weight for weight in (*products, head) if weight.element_size() == 4]
    teachers = {id(p): p.nbytes for other in others for p in other.parameters()}
    return TrainingMemory(
        spec=ModelLayout(base.config, {}).spec,
        weights_bytes=everything + 5 * masks,  # an adapter over a pruned matrix makes it anew in single precision
        largest_bytes=2 * max(in_blocks, default=0) + everything - sum(in_blocks),
        copied=sum(weight.numel() for weight in narrowed) if mixed else 0,
        trained=trained,
        others_bytes=sum(teachers.values()),
        mixed=mixed,
        adapters=trained < whole,
        on_cpu=run.device == "cpu",
    )


def usable_bytes(run: Run, world: DistEnv) -> int:
    """Of one device: of its limit, less the headroom; a processor's memory is shared by its processes."""
    if run.device == "cpu":
        limit = run.memory_limit_bytes or physical_memory_bytes() // world.local_size
        return math.floor(HEADROOM * limit)
    import torch

    has = torch.cuda.get_device_properties(world.local_rank).total_memory
    return math.floor(HEADROOM * min(run.memory_limit_bytes or has, has))


def check(
    found: TrainingMemory,
    run: Run,
    world: DistEnv,
    *,
    tokens_per_device: int,
    share: int,
    longest: int,
    work: float,
    usable: int | None = None,
) -> TrainingMemoryPlan:
    """How the training will run on these devices.

    Args:
        tokens_per_device: at a time, as asked for; 0: as many as fit.
        share: of an optimizer step's tokens, that each device takes.
        longest: document, which cannot be cut into two batches.
        work: tokens of the whole training.

    Raises:
        UserError: it cannot fit; the message says what would.
    """
    usable = usable if usable is not None else usable_bytes(run, world)
    process = 0 if run.device != "cpu" else max(0, resident_bytes() - found.weights_bytes - found.others_bytes)
    left = usable - process
    asked = max(longest, min(tokens_per_device or share, share))
    least = asked if tokens_per_device else max(longest, min(share, SHORTEST))
    whole_weights = can_shard(found)
    shards = [1] if run.parallel == "ddp" or world.size == 1 or not whole_weights else [1, world.size]
    if run.parallel == "fsdp" and world.size > 1:
        if not whole_weights:
            raise UserError(
                "hardware.parallel=fsdp spreads dense weights over the devices, and these are quantized; set hardware.parallel=ddp"
            )
        shards = [world.size]
    for parts in shards:
        for checkpointing in (False, True):
            if found.needed(least, checkpointing, parts) > left:
                continue
            tokens = asked
            while tokens > least and found.needed(tokens, checkpointing, parts) > left:
                tokens = max(least, tokens // 2)
            needed = process + found.needed(tokens, checkpointing, parts)
            return TrainingMemoryPlan(
                tokens, needed, usable, checkpointing, parts > 1, _seconds(found, run, world, work, checkpointing)
            )
    needed = process + found.needed(least, True, shards[-1])
    raise UserError(
        f"training needs about {_size(needed)} on each device with {least:,} tokens at a time, and {_size(usable)} are usable; "
        f"{_way_out(found, left, least, world, whole_weights)}"
    )


def can_shard(found: TrainingMemory) -> bool:
    """Quantized weights take fewer bytes than half precision, and are no matrices that could be spread."""
    return found.weights_bytes >= 2 * found.spec.parameters


def _way_out(found: TrainingMemory, left: float, least: int, world: DistEnv, whole_weights: bool) -> str:
    for checkpointing, parts in ((True, 1), (True, world.size)):
        fewer = found.most(left, least // 2, checkpointing, parts)
        if fewer:
            shorter = f"method.<name>.max_length={fewer} and tokens_per_device={fewer}"
            return f"it fits with {shorter}" + (" and hardware.parallel=fsdp" if parts > world.local_size == 1 else "")
    ways = []
    if whole_weights:
        quantized = dataclasses.replace(
            found,
            weights_bytes=math.ceil(found.weights_bytes * 4.5 / 32),
            copied=0,
            trained=min(found.trained, _lora(found)),
        )
        if quantized.needed(SHORTEST, True) <= left:
            ways.append("method=[qlora], which keeps the weights at 4 bits")
        for devices in (2, 4, 8, 16, 32, 64):
            if devices > world.size and found.needed(SHORTEST, True, devices) <= left:
                ways.append(f"{devices} such devices with hardware.parallel=fsdp")
                break
    return f"it fits with {', or '.join(ways)}" if ways else "take a smaller model, or devices with more memory"


def _lora(found: TrainingMemory) -> int:
    return 16 * found.spec.lora_width


def _seconds(found: TrainingMemory, run: Run, world: DistEnv, work: float, checkpointing: bool) -> float | None:
    """Two operations a weight for the forward pass, two for the inputs' gradient, two for that of what is trained."""
    flops = run.tflops * 1e12 if run.tflops else _speed(found.mixed) if run.device == "cpu" else None
    if not flops:
        return None
    n = found.spec
    per_token = 2 * ((3 if checkpointing else 2) * n.parameters + found.trained)
    cores = 1.0 if run.device != "cpu" else max(1.0, world.local_size / available_cores())  # processes that share cores
    return work * per_token / (EFFICIENCY * flops * world.size / cores)


@functools.cache
def _speed(mixed: bool) -> float:
    import torch

    from winnow.estimate.machine import product_flops

    return product_flops(torch.bfloat16 if mixed else torch.float32)


def _size(size: float) -> str:
    return human("size_bytes", size)
