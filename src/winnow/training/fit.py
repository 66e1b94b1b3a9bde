"""Runs a training under Lightning: devices, precision, progress, checkpoints, resumption.

Checkpoints go to `<run folder>/checkpoints/last.ckpt`, written whole or not at all; the same call on the same folder goes on
from there, on one device in `32-true` bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from winnow.core.errors import RankLost, UserError
from winnow.data.encoding import Encoded
from winnow.hardware.run import Run
from winnow.model.adapter import base_model
from winnow.model.packed_attention import packed
from winnow.model.packing import cast_weights
from winnow.training import batch_size, dist_env, kernels, low_rank, preflight
from winnow.training.callbacks import Checkpoints, EarlyStop, Progress, check_finite
from winnow.training.module import Recovery, Schedule
from winnow.training.objective import CrossEntropy, Objective
from winnow.training.packed_rows import Documents
from winnow.training.student import Student


@dataclass(frozen=True)
class Batching:
    """How much is trained on at a time.

    Attributes:
        tokens: of an optimizer step, over all devices, about.
        tokens_per_device: that lie on a device at a time; 0: all that a step asks of it.
        held_out: documents to validate on.
        patience: looks at the held-out loss without progress after which training ends; 0: never.
    """

    tokens: int
    tokens_per_device: int = 0
    held_out: int = 0
    patience: int = 0

    def accumulate(self, world_size: int) -> int:
        """Bins that each device takes a step."""
        return max(1, round(self.tokens / (world_size * self.per_device(world_size))))

    def per_device(self, world_size: int) -> int:
        share = math.ceil(self.tokens / world_size)
        return min(self.tokens_per_device or share, share)


@dataclass(frozen=True)
class Fitted:
    """What came out of a training, beside the weights.

    Attributes:
        loss: mean over the last tenth of the steps.
        held_out_loss: at the end; None where nothing was held out.
        held_out_loss_before: before the first step.
        precision: that it was trained in, by Lightning's name.
        steps: that were made, all resumptions together.
        tokens_per_second: of useful tokens over all devices, since the start or the last resumption, as are the seconds.
        resumed_at_step: where the last resumption began; None for a training that was never cut off. Then the time and the
            energy that a manifest records beside it are those since.
    """

    loss: float
    steps: int
    tokens_per_second: float
    seconds: float
    precision: str = "32-true"
    held_out_loss: float | None = None
    held_out_loss_before: float | None = None
    resumed_at_step: int | None = None

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def fit(
    model: Any,
    rows: Sequence[Encoded],
    schedule: Schedule,
    batching: Batching,
    run: Run,
    *,
    precision: str = "32-true",
    objective: Objective | None = None,
    checkpoint_minutes: float | None = None,
    log_seconds: float = 10.0,
    student: Student | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains those parameters of `model` in place that need a gradient, for `schedule.steps` optimizer steps.

    Args:
        settings: what a checkpoint must have been made with to go on from it, beside model, documents and batches; the
            schedule's where none are given.

    Raises:
        UserError: too few documents, a loss that is not finite, or a checkpoint in the run's folder that is damaged or of another
            training.
        SystemExit: 143, after a checkpoint, when the process is told to stop.
    """
    world = dist_env.world()
    dist_env.join(run, world)
    objective = objective or CrossEntropy()
    demand, flight, limits = _placed(model, rows, objective, schedule, batching, run, world, precision)
    with kernels.fused(model, dist_env.local_device(run), run.log), low_rank.in_few_passes(model):
        student = student or Student(model)
        tokens = batch_size.choose(student, objective, rows, run, world, demand, flight, precision=precision, **limits)
        batching = dataclasses.replace(batching, tokens_per_device=tokens)
        return _trained(
            model,
            student,
            rows,
            objective,
            schedule,
            batching,
            run,
            world,
            flight,
            precision=precision,
            checkpoint_minutes=checkpoint_minutes,
            log_seconds=log_seconds,
            settings=settings,
        )


def _trained(
    model: Any,
    student: Student,
    rows: Sequence[Encoded],
    objective: Objective,
    schedule: Schedule,
    batching: Batching,
    run: Run,
    world: dist_env.DistEnv,
    flight: preflight.TrainingMemoryPlan,
    *,
    precision: str,
    checkpoint_minutes: float | None,
    log_seconds: float,
    settings: Mapping[str, Any] | None,
) -> Fitted:
    """`fit` for a model that lies on its device already, with the batches that fit there."""
    lightning.seed_everything(run.seed, verbose=False)
    if not student.packs:
        run.log("documents are padded, not packed: this architecture cannot be told where they begin in a row")
    pad = None if student.packs else int(getattr(model.config, "pad_token_id", None) or 0)
    data = Documents(rows, batching.per_device(world.size), run.seed, batching.held_out, pad)
    progress = Progress(run, schedule.steps, log_seconds)
    callbacks: list[Any] = [progress]
    early = EarlyStop(run, data, schedule.steps, patience=batching.patience) if batching.held_out else None
    if early is not None:
        callbacks.append(early)
    held = {
        **(settings if settings is not None else {f"schedule.{k}": v for k, v in dataclasses.asdict(schedule).items()}),
        "precision": precision,
        "seed": run.seed,
        "tokens_per_device": data.capacity,
        "batches_per_step": batching.accumulate(world.size) * world.size,
        "documents": f"{len(data.training)} ({data.digest()})",
        "weights": digest(model),
    }
    checkpoints = Checkpoints(run, run.folder / "checkpoints", checkpoint_minutes or math.inf, held)
    callbacks.append(checkpoints)
    resume = checkpoints.found()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(
        logging.WARNING
    )  # which devices there are, tips
    trainer = lightning.Trainer(
        **dist_env.trainer_arguments(run, world, flight.sharded),
        precision=precision,  # type: ignore[arg-type]
        max_steps=schedule.steps,
        accumulate_grad_batches=batching.accumulate(world.size),
        gradient_clip_val=1.0 if schedule.optimizer == "adamw" else None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    started = time.monotonic()
    module = Recovery(student, schedule, objective, flight.sharded)
    model.train()
    # what is computed a second time, is so in the backward pass
    isolated = packed(student.base) if flight.checkpointing and student.packs else contextlib.nullcontext()
    with warnings.catch_warnings(), isolated:
        warnings.filterwarnings(
            "ignore", message=".*(num_workers|LeafSpec|does not have many workers|transfer_batch_to_device).*"
        )
        with _endings(world, checkpoints, progress):
            trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    check_finite(student.trainable, "after the last step")
    if early is not None:
        early.keep_best(module, trainer.global_step)
    if flight.sharded:
        dist_env.unshard(student)
        student.__dict__.pop("trainable", None)
    if flight.checkpointing:
        student.base.gradient_checkpointing_disable()
    model.eval()
    seconds = time.monotonic() - started
    return Fitted(
        loss=progress.mean(),
        steps=trainer.global_step,
        tokens_per_second=progress.total_tokens / max(1e-9, time.monotonic() - progress.started),
        seconds=round(seconds, 3),
        precision=precision,
        held_out_loss=early.latest if early is not None else None,
        held_out_loss_before=early.before if early is not None else None,
        resumed_at_step=progress.first if resume is not None else None,
    )


@contextlib.contextmanager
def _endings(world: dist_env.DistEnv, checkpoints: Checkpoints, progress: Progress) -> Iterator[None]:
    """Whatever way Lightning ends, it is said in our words, and signals and terminal are as before."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning makes an exit of, and Ctrl-C deaf
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if world.size > 1 and dist_env.is_lost(error):
            raise RankLost(f"rank {world.rank}: another process of the training is gone") from error
        raise
    finally:
        checkpoints.close()
        progress.close()


def _placed(
    model: Any,
    rows: Sequence[Encoded],
    objective: Objective,
    schedule: Schedule,
    batching: Batching,
    run: Run,
    world: dist_env.DistEnv,
    precision: str,
) -> tuple[preflight.TrainingMemory, preflight.TrainingMemoryPlan, dict[str, int]]:
    """Brings the model to its device; returns the memory it needs, how it will train, and limits of its batches in tokens.

    Raises:
        UserError: it cannot fit.
    """
    others = [x for x in vars(objective).values() if isinstance(x, torch.nn.Module)]
    demand = preflight.demand(model, run, precision == "bf16-mixed", others)
    share, longest = math.ceil(batching.tokens / world.size), max((len(row.ids) for row in rows), default=1)
    asked = {"tokens_per_device": batching.tokens_per_device, "share": share, "longest": longest}
    work = schedule.steps * batching.tokens
    flight: preflight.TrainingMemoryPlan = dist_env.agreed(
        preflight.check(demand, run, world, **asked, work=work), world
    )
    if flight.sharded and schedule.optimizer == "muon":
        raise UserError(
            "optimizer=muon needs whole matrices, and the weights are spread over the devices; set optimizer=adamw"
        )
    if world.is_rank_zero:
        run.log(f"training {flight}")
    if flight.checkpointing:
        recompute(model)
    if flight.sharded:
        cast_weights(model, torch.float32)  # what is sharded together must be of one type
    else:  # what is spread is brought to the device a block at a time
        model.to(dist_env.local_device(run))
    return demand, flight, asked


def recompute(model: Any) -> None:
    """Lets every block keep its input alone, and compute the rest a second time in the backward pass."""
    base = base_model(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def digest(model: Any) -> str:
    """What a model's weights are known by: a hash of their names, shapes, and some values of each."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {some.tolist()}\n".encode())
    return found.hexdigest()[:12]
