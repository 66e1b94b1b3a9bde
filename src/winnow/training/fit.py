"""Runs a training under Lightning, with devices, precision, progress, checkpoints and resumption.

Checkpoints are written atomically to `<run folder>/checkpoints/last.ckpt`. The same call on the same folder resumes from there;
on one device in `32-true` the result is bit-identical.
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
from winnow.estimate.training_memory import TrainingMemory
from winnow.hardware.run import Run
from winnow.model.adapter import base_model
from winnow.model.packed_attention import packed
from winnow.model.packing import cast_weights
from winnow.training import batch_size, dist_env, kernels, low_rank, preflight
from winnow.training.callbacks import EarlyStop, Progress, check_finite
from winnow.training.module import Recovery, Schedule
from winnow.training.objective import CrossEntropy, Objective
from winnow.training.packed_rows import Documents
from winnow.training.student import Student
from winnow.training.training_checkpoint import Checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batching:
    """The sizes of batches and of the validation set.

    Attributes:
        tokens: tokens of an optimizer step, over all devices, approximately.
        tokens_per_device: tokens on a device at a time; 0: the device's whole share of a step.
        held_out: number of documents for validation.
        patience: stop after this many of the ten validation checks without improvement; 0: never.
    """

    tokens: int
    tokens_per_device: int = 0
    held_out: int = 0
    patience: int = 0

    def accumulate(self, world_size: int) -> int:
        """Returns the number of bins per device and optimizer step."""
        return max(1, round(self.tokens / (world_size * self.per_device(world_size))))

    def per_device(self, world_size: int) -> int:
        """Returns the tokens on a device at a time."""
        share = math.ceil(self.tokens / world_size)
        return min(self.tokens_per_device or share, share)


@dataclass(frozen=True)
class Fitted:
    """The results of a training, other than the weights.

    Attributes:
        loss: mean over the last tenth of the steps.
        held_out_loss: at the end; None without held-out documents.
        held_out_loss_before: before the first step.
        precision: the training precision, by Lightning's name.
        steps: completed steps, including those before a resumption.
        tokens_per_second: useful tokens over all devices. Like `seconds`, it counts from the start or the last resumption.
        resumed_at_step: the step of the last resumption; None for a training that was never interrupted. The time and energy
            in the manifest count from that step.
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
        """Returns the entry of a manifest."""
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
    """Trains in place the parameters of `model` that need a gradient, for `schedule.steps` optimizer steps.

    Args:
        settings: the settings that a checkpoint must share to be resumed, besides model, documents and batches; by default
            those of the schedule.

    Raises:
        UserError: too few documents, a loss that is not finite, or a checkpoint in the run's folder that is damaged or belongs to
            another training.
        SystemExit: code 143, after a checkpoint, when the process receives a stop signal.
    """
    world = dist_env.world()
    dist_env.join(run, world)
    objective = objective or CrossEntropy()
    memory, plan, limits = _place_model(model, rows, objective, schedule, batching, run, world, precision)
    with kernels.fused(model, dist_env.local_device(run)), low_rank.fused_lora(model):
        student = student or Student(model)
        tokens = batch_size.choose_batch_tokens(
            student, objective, rows, run, world, memory, plan, precision=precision, **limits
        )
        batching = dataclasses.replace(batching, tokens_per_device=tokens)
        return _run_training(
            model,
            student,
            rows,
            objective,
            schedule,
            batching,
            run,
            world,
            plan,
            precision=precision,
            checkpoint_minutes=checkpoint_minutes,
            log_seconds=log_seconds,
            settings=settings,
        )


def _run_training(
    model: Any,
    student: Student,
    rows: Sequence[Encoded],
    objective: Objective,
    schedule: Schedule,
    batching: Batching,
    run: Run,
    world: dist_env.DistEnv,
    plan: preflight.TrainingMemoryPlan,
    *,
    precision: str,
    checkpoint_minutes: float | None,
    log_seconds: float,
    settings: Mapping[str, Any] | None,
) -> Fitted:
    """Runs `fit` for a model that is already on its device, with the batch size that fits there."""
    lightning.seed_everything(run.seed, verbose=False)
    if not student.packs:
        logger.info("documents are padded, not packed: this architecture cannot be told where they begin in a row")
    pad = None if student.packs else int(getattr(model.config, "pad_token_id", None) or 0)
    data = Documents(rows, batching.per_device(world.size), run.seed, batching.held_out, pad)
    progress = Progress(run, schedule.steps, log_seconds)
    callbacks: list[Any] = [progress]
    early_stop = EarlyStop(run, data, schedule.steps, patience=batching.patience) if batching.held_out else None
    if early_stop is not None:
        callbacks.append(early_stop)
    checkpoint_settings = {
        **(settings if settings is not None else {f"schedule.{k}": v for k, v in dataclasses.asdict(schedule).items()}),
        "precision": precision,
        "seed": run.seed,
        "tokens_per_device": data.capacity,
        "batches_per_step": batching.accumulate(world.size) * world.size,
        "documents": f"{len(data.training)} ({data.digest()})",
        "weights": weights_digest(model),
    }
    checkpoints = Checkpoints(run.folder / "checkpoints", checkpoint_minutes or math.inf, checkpoint_settings)
    callbacks.append(checkpoints)
    resume_path = checkpoints.resume_path()
    # hides Lightning's lines about devices and its tips
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        **dist_env.trainer_arguments(run, world, plan.sharded),
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
    module = Recovery(student, schedule, objective, plan.sharded)
    model.train()
    # Activation checkpointing runs the forward pass again in backward, so the attention patch stays active.
    attention_patch = packed(student.base) if plan.checkpointing and student.packs else contextlib.nullcontext()
    with warnings.catch_warnings(), attention_patch:
        warnings.filterwarnings(
            "ignore", message=".*(num_workers|LeafSpec|does not have many workers|transfer_batch_to_device).*"
        )
        with _translated_exceptions(world, checkpoints, progress):
            trainer.fit(module, data, ckpt_path=resume_path, weights_only=False)
    check_finite(student.trainable, "after the last step")
    if early_stop is not None:
        early_stop.restore_best(module, trainer.global_step)
    if plan.sharded:
        dist_env.unshard(student)
        student.__dict__.pop("trainable", None)
    if plan.checkpointing:
        student.base.gradient_checkpointing_disable()
    model.eval()
    seconds = time.monotonic() - started
    return Fitted(
        loss=progress.mean(),
        steps=trainer.global_step,
        tokens_per_second=progress.total_tokens / max(1e-9, time.monotonic() - progress.started),
        seconds=round(seconds, 3),
        precision=precision,
        held_out_loss=early_stop.latest if early_stop is not None else None,
        held_out_loss_before=early_stop.before if early_stop is not None else None,
        resumed_at_step=progress.first if resume_path is not None else None,
    )


@contextlib.contextmanager
def _translated_exceptions(world: dist_env.DistEnv, checkpoints: Checkpoints, progress: Progress) -> Iterator[None]:
    """Translates the exceptions of Lightning's `fit`, and restores signal handlers and terminal when it ends."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit and ignores Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if world.size > 1 and dist_env.is_rank_lost(error):
            raise RankLost(f"rank {world.rank}: another process of the training is gone") from error
        raise
    finally:
        checkpoints.close()
        progress.close()


def _place_model(
    model: Any,
    rows: Sequence[Encoded],
    objective: Objective,
    schedule: Schedule,
    batching: Batching,
    run: Run,
    world: dist_env.DistEnv,
    precision: str,
) -> tuple[TrainingMemory, preflight.TrainingMemoryPlan, dict[str, int]]:
    """Moves the model to its device.

    Returns:
        the memory that the training needs, the plan for it, and the limits of its batches in tokens.

    Raises:
        UserError: the training cannot fit.
    """
    other_models = [x for x in vars(objective).values() if isinstance(x, torch.nn.Module)]
    memory = preflight.training_memory(model, run, precision == "bf16-mixed", other_models)
    share, longest = math.ceil(batching.tokens / world.size), max((len(row.ids) for row in rows), default=1)
    limits = {"tokens_per_device": batching.tokens_per_device, "share": share, "longest": longest}
    total_tokens = schedule.steps * batching.tokens
    plan: preflight.TrainingMemoryPlan = dist_env.broadcast_from_rank_zero(
        preflight.plan_training(memory, run, world, **limits, total_tokens=total_tokens), world
    )
    if plan.sharded and schedule.optimizer == "muon":
        raise UserError(
            "optimizer=muon needs whole matrices, and the weights are spread over the devices; set optimizer=adamw"
        )
    if world.is_rank_zero:
        logger.info(f"training {plan}")
    if plan.checkpointing:
        enable_activation_checkpointing(model)
    if plan.sharded:
        cast_weights(model, torch.float32)  # parameters that are sharded together must have one dtype
    else:  # sharding moves the weights to the device block by block
        model.to(dist_env.local_device(run))
    return memory, plan, limits


def enable_activation_checkpointing(model: Any) -> None:
    """Makes every block store only its input, and recompute its activations in the backward pass."""
    base = base_model(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def weights_digest(model: Any) -> str:
    """Returns a hash of the names and shapes of a model's weights, and of some values of each."""
    sha256 = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)].cpu()
        sha256.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values.tolist()}\n".encode())
    return sha256.hexdigest()[:12]
