"""Runs a `Recovery` module on `Documents` under Lightning: progress, checkpoints, resumption.

Checkpoints go to `<run folder>/checkpoints/last.ckpt`, written whole or not at all; the same call on the same folder goes on
from there. Lightning's own loggers are off: figures reach W&B through `winnow.report`.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from winnow.recovery.data import Documents
from winnow.recovery.module import Recovery, Schedule
from winnow.types import Run


class Progress(Callback):
    """A line with step, loss and tokens/s every `seconds`: readable in a log file as well as in a terminal."""

    def __init__(self, run: Run, steps: int, seconds: float = 10.0) -> None:
        self.run, self.steps, self.seconds = run, steps, seconds
        self.tokens, self.total, self.since = 0, 0.0, 0.0
        self.batches = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        import time

        now = time.monotonic()
        self.since = self.since or now
        self.tokens += int(batch["attention_mask"].sum())
        self.total += float(outputs["loss"])
        self.batches += 1
        if now - self.since > self.seconds or trainer.global_step == self.steps:
            rate = self.tokens / max(now - self.since, 1e-9)
            left = (self.steps - trainer.global_step) * (now - self.since) / self.batches
            self.run.log(
                f"step {trainer.global_step}/{self.steps}  loss {self.total / self.batches:.4f}  "
                f"{rate:,.0f} tokens/s  {timedelta(seconds=round(left))} left"
            )
            self.tokens, self.total, self.since, self.batches = 0, 0.0, now, 0


class Checkpoints(ModelCheckpoint):
    """Every `minutes`, written to a scratch name and renamed, so that a kill leaves the last whole one."""

    def __init__(self, folder: Path, minutes: float) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            train_time_interval=timedelta(minutes=minutes),
            save_top_k=1,
            enable_version_counter=False,
        )

    def _save_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        scratch = f"{filepath}.partial"
        trainer.save_checkpoint(scratch, self.save_weights_only)
        if trainer.is_global_zero:
            Path(scratch).replace(filepath)


def fit(
    model: nn.Module,
    data: Documents,
    schedule: Schedule,
    run: Run,
    *,
    precision: str = "32-true",
    accumulate: int = 1,
    checkpoint_minutes: float | None = None,
    log_seconds: float = 10.0,
) -> float:
    """Trains `model` in place for `schedule.steps` optimizer steps; returns the mean loss of the last tenth of them."""
    lightning.seed_everything(run.seed, verbose=False)
    tail = _Tail(schedule.steps)
    callbacks: list[Callback] = [Progress(run, schedule.steps, log_seconds), tail]
    last = run.folder / "checkpoints" / "last.ckpt"
    if checkpoint_minutes:
        callbacks.append(Checkpoints(last.parent, checkpoint_minutes))
    trainer = lightning.Trainer(
        accelerator="cpu" if run.device == "cpu" else "auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=schedule.steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0 if schedule.optimizer == "adamw" else None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoint_minutes is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder,
    )
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|does not have many workers).*")
        trainer.fit(Recovery(model, schedule), data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    model.eval()
    return tail.mean()


class _Tail(Callback):
    """Mean loss of the last tenth of the steps."""

    def __init__(self, steps: int) -> None:
        self.start = steps - max(1, steps // 10)
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step > self.start:
            self.losses.append(float(outputs["loss"]))

    def mean(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")
