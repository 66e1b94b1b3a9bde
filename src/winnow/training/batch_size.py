"""How many tokens a device takes at a time: found once by doubling, and remembered for the model, the length and the hardware.

On CUDA a forward and a backward pass is made with n, 2n, 4n tokens, until the allocator's peak would pass the limit or a step's
share is reached; on a processor, where a peak cannot be taken back, the forecast of `winnow.training.preflight` decides. The
answer is kept in `batch_sizes.json` of the run's cache: a training that is resumed must cut its steps up as before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from winnow.core.files import write_json
from winnow.data.encoding import Encoded, collate, moved
from winnow.hardware.run import Run
from winnow.training.dist_env import DistEnv, agreed, local_device
from winnow.training.objective import Objective
from winnow.training.preflight import TrainingMemory, TrainingMemoryPlan
from winnow.training.student import Student

NAME = "batch_sizes.json"


def choose(
    student: Student,
    objective: Objective,
    rows: Sequence[Encoded],
    run: Run,
    world: DistEnv,
    demand: TrainingMemory,
    flight: TrainingMemoryPlan,
    *,
    precision: str,
    tokens_per_device: int,
    share: int,
    longest: int,
) -> int:
    """As asked for (`tokens_per_device`), or as many as fit: the first process finds out, and tells the others."""
    if tokens_per_device:
        return max(longest, min(tokens_per_device, share))
    tokens = flight.tokens
    if world.is_rank_zero:
        device = local_device(run)
        fits = _forecast(flight)
        if run.device == "cuda" and not flight.sharded:
            states = 8 * demand.trained  # the optimizer's moments
            step = _step(student, objective, rows, precision, device)
            fits = measured(step, list(student.trainable.values()), device, flight.usable_bytes, states)
        key = {
            "model": hashlib.sha256(student.base.config.to_json_string().encode()).hexdigest()[:12],
            "trained": demand.trained,
            "objective": type(objective).__name__,
            "teacher_bytes": demand.others_bytes,
            "longest": longest,
            "precision": precision,
            "devices": world.size,
            "sharded": flight.sharded,
            "checkpointing": flight.checkpointing,
            "hardware": hardware_name(device),
            "limit_bytes": run.memory_limit_bytes,
        }
        # of one document at least, since that is not cut
        tokens = max(longest, found(run.cache or run.folder, key, fits, min(longest, share), share))
    chosen: int = agreed(tokens, world)
    return chosen


def _forecast(flight: TrainingMemoryPlan) -> Callable[[int], bool]:
    return lambda tokens: tokens <= flight.tokens


def _step(
    student: Student, objective: Objective, rows: Sequence[Encoded], precision: str, device: str
) -> Callable[[int], torch.Tensor]:
    """The loss of a batch of about so many tokens: of the longest documents, which take most."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))

    def step(tokens: int) -> torch.Tensor:
        chosen: list[int] = []
        held = 0
        for i in itertools.cycle(order):
            if held and held + len(rows[i].ids) > tokens:
                break
            chosen.append(i)
            held += len(rows[i].ids)
        batch = collate([rows[i] for i in chosen]) | {"documents": chosen}
        on_device = moved(batch, device)
        student.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return objective(student, on_device)

    return step


def doubled(fits: Callable[[int], bool], start: int, share: int) -> tuple[int, bool]:
    """The largest of start, 2 start, 4 start, ..., share that fits, and whether the next one did not.

    `start` is taken without asking: it is the least that there is.
    """
    tokens = min(start, share)
    while tokens < share:
        following = min(2 * tokens, share)
        if not fits(following):
            return tokens, True
        tokens = following
    return tokens, False


def found(cache: Path, key: Mapping[str, Any], fits: Callable[[int], bool], start: int, share: int) -> int:
    """What `doubled` finds, or found before for the same `key`: then `fits` is asked only beyond what is known."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    known = _read(cache / NAME).get(name)
    if known is not None and start <= known["tokens"]:
        if known["limited"] or known["tokens"] >= share:
            return min(int(known["tokens"]), share)
        start = int(known["tokens"])
    tokens, limited = doubled(fits, start, share)
    _remember(cache / NAME, name, {"tokens": tokens, "limited": limited, **key})
    return tokens


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _remember(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Adds an entry, whole or not at all; of two that are added at once one may be lost, and is found again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_read(path), name: entry}, indent=1)


def hardware_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cpu":
        from winnow.hardware.inventory import cpu_model

        return cpu_model()
    return torch.cuda.get_device_name(device)


def measured(
    step: Callable[[int], Any], parameters: list[Any], device: str, usable: int, states_bytes: int
) -> Callable[[int], bool]:
    """Whether a forward and backward pass fits on a CUDA device.

    Args:
        step: the loss of a batch of about so many tokens.
        parameters: that get a gradient, which is thrown away.
        states_bytes: that a training holds beside: the optimizer's moments.
    """

    def fits(tokens: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(tokens).backward()
            return torch.cuda.max_memory_allocated(device) + states_bytes <= usable
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            for parameter in parameters:
                parameter.grad = None
            torch.cuda.empty_cache()

    return fits
