"""Chooses the tokens per device by doubling, and caches the result by model, document length and hardware.

On CUDA, a forward and backward pass runs with n, 2n, 4n tokens, until the allocator's peak would exceed the limit or a step's
share is reached. On a CPU, where a peak cannot be undone, the estimate of `winnow.training.preflight` decides. The result is
stored in the run's cache, because a resumed training must divide its steps as before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from winnow.core.cache import Cache
from winnow.data.encoding import Encoded, collate, to_device
from winnow.estimate.training_memory import TrainingMemory
from winnow.hardware.run import Run
from winnow.training.dist_env import DistEnv, broadcast_from_rank_zero, local_device
from winnow.training.objective import Objective
from winnow.training.preflight import TrainingMemoryPlan
from winnow.training.student import Student

FOLDER = "batch_sizes"


def choose_batch_tokens(
    student: Student,
    objective: Objective,
    rows: Sequence[Encoded],
    run: Run,
    world: DistEnv,
    memory: TrainingMemory,
    plan: TrainingMemoryPlan,
    *,
    precision: str,
    tokens_per_device: int,
    share: int,
    longest: int,
) -> int:
    """Returns the requested `tokens_per_device`, or as many as fit, which rank 0 measures and broadcasts."""
    if tokens_per_device:
        return max(longest, min(tokens_per_device, share))
    tokens = plan.tokens
    if world.is_rank_zero:
        device = local_device(run)
        fits = _fits_by_estimate(plan)
        if run.device == "cuda" and not plan.sharded:
            step = _loss_of_tokens(student, objective, rows, precision, device)
            fits = fits_on_cuda(step, list(student.trainable.values()), device, plan.usable_bytes, memory.moments_bytes)
        key = {
            "model": hashlib.sha256(student.base.config.to_json_string().encode()).hexdigest()[:12],
            "trained": memory.trainable_parameters,
            "objective": type(objective).__name__,
            "teacher_bytes": memory.other_models_bytes,
            "longest": longest,
            "precision": precision,
            "devices": world.size,
            "sharded": plan.sharded,
            "checkpointing": plan.checkpointing,
            "hardware": hardware_name(device),
            "limit_bytes": run.memory_limit_bytes,
        }
        # at least one document, which is never split
        tokens = max(longest, cached_batch_tokens(run.cache or run.folder, key, fits, min(longest, share), share))
    batch_tokens: int = broadcast_from_rank_zero(tokens, world)
    return batch_tokens


def _fits_by_estimate(plan: TrainingMemoryPlan) -> Callable[[int], bool]:
    return lambda tokens: tokens <= plan.tokens


def _loss_of_tokens(
    student: Student, objective: Objective, rows: Sequence[Encoded], precision: str, device: str
) -> Callable[[int], torch.Tensor]:
    """Returns a function from a number of tokens to the loss of a batch of about that size.

    The batch consists of the longest documents, which take the most memory.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))

    def step(tokens: int) -> torch.Tensor:
        indices: list[int] = []
        batch_tokens = 0
        for i in itertools.cycle(order):
            if batch_tokens and batch_tokens + len(rows[i].ids) > tokens:
                break
            indices.append(i)
            batch_tokens += len(rows[i].ids)
        batch = collate([rows[i] for i in indices]) | {"documents": indices}
        on_device = to_device(batch, device)
        student.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return objective(student, on_device)

    return step


def double_until_full(fits: Callable[[int], bool], start: int, share: int) -> tuple[int, bool]:
    """Returns the largest of start, 2 start, 4 start, ..., share that fits, and whether the next one did not fit.

    `start` is not tested, because it is the smallest possible value.
    """
    tokens = min(start, share)
    while tokens < share:
        following = min(2 * tokens, share)
        if not fits(following):
            return tokens, True
        tokens = following
    return tokens, False


def cached_batch_tokens(
    cache: Path, key: Mapping[str, Any], fits: Callable[[int], bool], start: int, share: int
) -> int:
    """Returns the result of `double_until_full`; for a cached `key` it tests only sizes beyond the cached one."""
    batch_sizes = Cache(cache / FOLDER, suffix=".json")
    entry = batch_sizes.entry(key)
    cached = batch_sizes.read(entry, _load)
    if cached is not None and start <= cached["tokens"]:
        if cached["limited"] or cached["tokens"] >= share:
            return min(cached["tokens"], share)
        start = cached["tokens"]
    tokens, limited = double_until_full(fits, start, share)
    with batch_sizes.writing(entry) as scratch:
        scratch.write_text(json.dumps({"tokens": tokens, "limited": limited, **key}, indent=1) + "\n", encoding="utf-8")
    return tokens


def _load(path: Path) -> dict[str, int]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged")
    return {name: int(stored[name]) for name in ("tokens", "limited")}


def hardware_name(device: str) -> str:
    """Returns the name of the GPU or of the CPU."""
    if device == "cpu":
        from winnow.hardware.inventory import cpu_model

        return cpu_model()
    return torch.cuda.get_device_name(device)


def fits_on_cuda(
    step: Callable[[int], Any], parameters: list[Any], device: str, usable: int, moments_bytes: int
) -> Callable[[int], bool]:
    """Returns a test of whether a forward and backward pass with a number of tokens fits on a CUDA device.

    Args:
        step: returns the loss of a batch of about the given number of tokens.
        parameters: the trainable parameters, whose gradients are discarded.
        moments_bytes: the optimizer's moments, which a training stores as well.
    """

    def fits(tokens: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(tokens).backward()
            return torch.cuda.max_memory_allocated(device) + moments_bytes <= usable
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            for parameter in parameters:
                parameter.grad = None
            torch.cuda.empty_cache()

    return fits
