"""What goes on beside the steps of a training: progress, checkpoints, ends that come early.

Each is told of optimizer steps, not of batches: `on_step(trainer, module)` is called once when a step is complete.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.training.packed_rows import Documents

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WAY_OUT = (  # of numbers that are not finite
    "lower the learning rate, or train with precision=32-true; the last checkpoint, if there is one, is from before that"
)
PREEMPTED = 128 + signal.SIGTERM  # the exit code of a training that was asked to stop and left a checkpoint


class EachStep(Callback):
    """A callback that is called after every optimizer step."""

    _steps = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.on_batch(trainer, outputs)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.on_step(trainer, module)

    def on_batch(self, trainer: lightning.Trainer, outputs: Any) -> None: ...

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None: ...


class Progress(EachStep):
    """Step, loss, tokens/s and time left: a bar in a terminal, a line every `seconds` in a file; points of the run's curves.

    Loss and tokens/s are those since the last line, over all devices. Also counts what the run's record wants: the tokens
    trained on since the start or the resumption, and the mean loss of the last tenth of the steps.
    """

    def __init__(self, run: Run, steps: int, seconds: float = 10.0) -> None:
        self.run, self.steps, self.seconds = run, steps, seconds
        self.losses: deque[float] = deque(maxlen=max(1, steps // 10))
        self.total_tokens = 0.0
        self.started = self._since = 0.0
        self.first = self._shown = 0  # steps that were done at the start, and at the last line
        self._tokens, self._loss = 0.0, 0.0  # since the last line
        self._step_tokens, self._step_loss = 0, 0.0  # of the step that is being made, on this device
        self._bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        self.started = self._since = time.monotonic()
        self.first = self._shown = trainer.global_step
        if self.run.bars and sys.stderr.isatty() and trainer.is_global_zero:
            from tqdm import tqdm

            self._bar = tqdm(total=self.steps, initial=self.first, unit="step", leave=False, dynamic_ncols=True)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, index: int) -> None:
        mask = batch.get("attention_mask")
        self._step_tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()

    def on_batch(self, trainer: lightning.Trainer, outputs: Any) -> None:
        self._step_loss += float(outputs["share"])

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None:
        loss, tokens = _summed(trainer, self._step_loss, self._step_tokens)
        self._step_loss, self._step_tokens = 0.0, 0
        self.losses.append(loss)
        self.total_tokens += tokens
        self._tokens += tokens
        self._loss += loss
        if trainer.is_global_zero:
            self._show(trainer.global_step, loss)

    def _show(self, step: int, loss: float) -> None:
        now = time.monotonic()
        figures = {"loss": loss}
        if self._bar is not None:
            self._bar.update()
        if now - self._since >= (min(1.0, self.seconds) if self._bar else self.seconds) or step == self.steps:
            mean, rate = self._loss / (step - self._shown), self._tokens / max(now - self._since, 1e-9)
            figures["tokens_per_second"] = rate
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {mean:.4f}, {rate:,.0f} tokens/s")
            else:
                left = (self.steps - step) * (now - self.started) / max(1, step - self.first)
                self.run.log(
                    f"step {step}/{self.steps}  loss {mean:.4f}  {rate:,.0f} tokens/s  {timedelta(seconds=round(left))} left"
                )
            self._tokens, self._loss, self._shown, self._since = 0.0, 0.0, step, now
        self.run.curve(step, figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def mean(self) -> float:
        """Of the last tenth of the steps."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])


class Checkpoints(EachStep):
    """`last.ckpt` every `minutes`, and when the process is asked to stop; written to a scratch name and renamed.

    SIGTERM: a checkpoint at the end of the step, then exit code 143. SIGUSR1, which Slurm sends before a job's time is up
    (`#SBATCH --signal=SIGUSR1@120`): the same, and the job is queued again. Devices agree on it after every step, so that
    none is left waiting for one that has gone.

    Args:
        settings: of the training; one with others is refused.
    """

    def __init__(self, run: Run, folder: Path, minutes: float, settings: dict[str, Any]) -> None:
        self.run, self.folder, self.minutes, self.settings = run, folder, minutes, settings
        self.asked: int = 0
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self._saved = 0.0

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def found(self) -> Path | None:
        """The checkpoint to go on from, if there is one.

        Raises:
            UserError: it is damaged.
        """
        if self._old.exists() and not self.last.exists():  # killed between two renamings
            self._old.rename(self.last)
        if self.last.is_file() and not _is_whole(self.last):
            raise UserError(f"{self.last} is damaged or cut short; remove it, and the same command starts anew")
        return self.last if self.last.exists() else None

    @property
    def _old(self) -> Path:
        return self.folder / "last.ckpt.old"

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        self._saved = time.monotonic()
        # after Lightning's own, which talk to other devices from inside the handler
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = number

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None:
        due = time.monotonic() - self._saved >= 60 * self.minutes
        asked, any_due = _agreed(trainer, self.asked, int(due))
        if asked or (any_due and trainer.global_step < trainer.max_steps):
            self.save(trainer, module)
        if asked:
            if trainer.is_global_zero:
                name = signal.Signals(asked).name
                self.run.log(f"{name}: step {trainer.global_step} is saved; the same command goes on from it")
                if asked == signal.SIGUSR1:
                    _requeue(self.run)
            raise SystemExit(PREEMPTED)

    def save(self, trainer: lightning.Trainer, module: Any) -> None:
        """Raises UserError if a weight is not finite: the checkpoint before stays."""
        check_finite(module.student.trainable, f"after step {trainer.global_step}")
        scratch = self.folder / "last.ckpt.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(scratch, weights_only=False)
        if trainer.is_global_zero:
            if scratch.is_file():
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
            if self.last.is_dir():  # of a model that is spread over devices; a folder is not replaced in one go
                shutil.rmtree(self._old, ignore_errors=True)
                self.last.rename(self._old)
            scratch.replace(self.last)
            shutil.rmtree(self._old, ignore_errors=True)
        self._saved = time.monotonic()

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["winnow"] = self.settings
        checkpoint["generators"] = {"torch": torch.get_rng_state()}

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        theirs = checkpoint.get("winnow", {})
        different = [k for k in {**self.settings, **theirs} if theirs.get(k) != self.settings.get(k)]
        if different:
            told = "; ".join(f"{k}: {theirs.get(k)} there, {self.settings.get(k)} here" for k in different[:3])
            raise UserError(
                f"{self.last} is a checkpoint of another training ({told}); use the same settings, or remove it to start anew"
            )
        torch.set_rng_state(checkpoint["generators"]["torch"])

    def close(self) -> None:
        """The signals are handled as before."""
        with contextlib.suppress(ValueError):
            for number, handler in self._before.items():
                signal.signal(number, handler)


class EarlyStop(EachStep):
    """Looks at the held-out loss `looks` times; ends the training when it has not fallen for `patience` looks in a row.

    The weights of the best look are put back at the end. Its first look is before the first step.
    """

    def __init__(self, run: Run, data: Documents, steps: int, looks: int = 10, patience: int = 0) -> None:
        self.run, self.data, self.patience = run, data, patience
        self.every = max(1, steps // looks)
        self.before = self.best = self.latest = math.inf
        self.best_step = self.missed = 0
        self._kept: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        if math.isinf(self.before):
            self._look(trainer, module)
            self.before = self.best

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._look(trainer, module)
            if self.patience and self.missed >= self.patience:
                if trainer.is_global_zero:
                    self.run.log(
                        f"held-out loss has not fallen below {self.best:.4f} for {self.missed} looks: stopped at step "
                        f"{trainer.global_step}, step {self.best_step} is kept"
                    )
                trainer.should_stop = True

    def _look(self, trainer: lightning.Trainer, module: Any) -> None:
        # where the weights are sharded, devices must make the same number of steps: each looks at all
        share = (1, 0) if module.sharded else (trainer.world_size, trainer.global_rank)
        batches = self.data.held_out(*share)
        total, targets = _summed(trainer, *module.held_out_loss(batches))
        self.latest = total / max(1, targets)
        if trainer.is_global_zero:
            self.run.curve(trainer.global_step, {"held_out_loss": self.latest})
        if self.latest < self.best:
            self.best, self.best_step, self.missed = self.latest, trainer.global_step, 0
            if self.patience:
                self._kept = {n: p.detach().to("cpu", copy=True) for n, p in module.student.trainable.items()}
        else:
            self.missed += 1

    def keep_best(self, module: Any, step: int) -> None:
        """Puts the weights of the best look back; `step` is the one that was reached."""
        if self._kept and self.best_step != step:
            with torch.no_grad():
                for name, parameter in module.student.trainable.items():
                    parameter.copy_(self._kept[name])
            self.latest = self.best

    def state_dict(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("before", "best", "latest", "best_step", "missed")}
        return {**numbers, "kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict.pop("kept")
        for name, value in state_dict.items():
            setattr(self, name, value)


def check_finite(parameters: Mapping[str, torch.Tensor], when: str) -> None:
    """Raises UserError if one of them is NaN or infinite."""
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity {when}; {WAY_OUT}")


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint, a zip file as `torch.save` writes it, has all its bytes; torch itself does not check them."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return False


def _agreed(trainer: lightning.Trainer, *flags: int) -> list[int]:
    """The largest of each flag on any device."""
    if trainer.world_size == 1:
        return list(flags)
    found = torch.tensor(flags, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [int(x) for x in found]


def _summed(trainer: lightning.Trainer, *values: float) -> list[float]:
    if trainer.world_size == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(found)
    return [float(x) for x in found]


def _requeue(run: Run) -> None:
    """Asks Slurm to queue this job again."""
    job = os.environ.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol")
    if job is None or scontrol is None:
        return
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    run.log(f"scontrol requeue {job}: {'done' if done.returncode == 0 else done.stderr.strip()}")
