"""Saves and restores the checkpoint of a training, also when the process receives a stop signal."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch

from winnow.core.errors import UserError
from winnow.core.files import put_in_place
from winnow.training.callbacks import OptimizerStepCallback, check_finite

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 128 + signal.SIGTERM  # the exit code of a training that a signal stopped after it saved a checkpoint


class Checkpoints(OptimizerStepCallback):
    """Writes `last.ckpt` every `minutes` and after a stop signal, under a scratch name that is then renamed.

    SIGTERM writes a checkpoint at the end of the step and exits with code 143. SIGUSR1, which Slurm sends before a job's time
    limit (`#SBATCH --signal=SIGUSR1@120`), does the same and requeues the job. Devices agree on the signal after every step,
    so that none waits for one that has exited.

    Args:
        settings: the settings of the training; a checkpoint with different settings is refused.
    """

    def __init__(self, folder: Path, minutes: float, settings: dict[str, Any]) -> None:
        self.folder, self.minutes, self.settings = folder, minutes, settings
        self.stop_signal: int = 0  # the last signal received; 0: none
        self._previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._saved = 0.0

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def resume_path(self) -> Path | None:
        """Returns the checkpoint to resume from; None if there is none.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if self._old.exists() and not self.last.exists():  # the process was killed between the two renames
            self._old.rename(self.last)
        if self.last.is_file() and not _is_intact(self.last):
            raise UserError(f"{self.last} is damaged or cut short; remove it, and the same command starts anew")
        return self.last if self.last.exists() else None

    @property
    def _old(self) -> Path:
        return self.folder / "last.ckpt.old"

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        self._saved = time.monotonic()
        # installed after Lightning's handlers, to replace them: they communicate with other devices inside the handler
        with contextlib.suppress(ValueError):  # raised outside the main thread
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None:
        due = time.monotonic() - self._saved >= 60 * self.minutes
        stop_signal, any_due = _max_over_devices(trainer, self.stop_signal, int(due))
        if stop_signal or (any_due and trainer.global_step < trainer.max_steps):
            self.save(trainer, module)
        if stop_signal:
            if trainer.is_global_zero:
                name = signal.Signals(stop_signal).name
                logger.info(f"{name}: step {trainer.global_step} is saved; the same command goes on from it")
                if stop_signal == signal.SIGUSR1:
                    _requeue()
            raise SystemExit(PREEMPTED)

    def save(self, trainer: lightning.Trainer, module: Any) -> None:
        """Writes the checkpoint; raises UserError if a weight is not finite, and keeps the previous checkpoint."""
        check_finite(module.student.trainable, f"after step {trainer.global_step}")
        scratch = self.folder / "last.ckpt.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(scratch, weights_only=False)
        if trainer.is_global_zero:
            if scratch.is_file():
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
            put_in_place(scratch, self.last, aside=self._old)  # the checkpoint of a sharded model is a folder
        self._saved = time.monotonic()

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["winnow"] = self.settings
        checkpoint["generators"] = {"torch": torch.get_rng_state()}

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("winnow", {})
        different = [k for k in {**self.settings, **saved} if saved.get(k) != self.settings.get(k)]
        if different:
            differences = "; ".join(f"{k}: {saved.get(k)} there, {self.settings.get(k)} here" for k in different[:3])
            raise UserError(
                f"{self.last} is a checkpoint of another training ({differences}); use the same settings, "
                f"or remove it to start anew"
            )
        torch.set_rng_state(checkpoint["generators"]["torch"])

    def close(self) -> None:
        """Restores the previous signal handlers."""
        with contextlib.suppress(ValueError):
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)


def _is_intact(path: Path) -> bool:
    """Returns whether a checkpoint, a zip file written by `torch.save`, is undamaged, which torch itself does not check."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return False


def _max_over_devices(trainer: lightning.Trainer, *flags: int) -> list[int]:
    """Returns the largest value of each flag over all devices."""
    if trainer.world_size == 1:
        return list(flags)
    maxima = torch.tensor(flags, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
    return [int(x) for x in maxima]


def _requeue() -> None:
    """Requeues this Slurm job; does nothing outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol")
    if job is None or scontrol is None:
        return
    process = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    logger.info(f"scontrol requeue {job}: {'done' if process.returncode == 0 else process.stderr.strip()}")
