"""Lightning callbacks that report the progress of a training and stop it early.

They act on optimizer steps, not on batches: `on_step(trainer, module)` is called once when a step is complete.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.training.packed_rows import Documents

logger = logging.getLogger(__name__)

NOT_FINITE_HINT = (
    "lower the learning rate, or train with precision=32-true; "
    "the last checkpoint, if there is one, is from before that"
)


class OptimizerStepCallback(Callback):
    """Calls `on_step` after every optimizer step and `on_batch` after every batch."""

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


class Progress(OptimizerStepCallback):
    """Shows step, loss, tokens/s and time left, as a bar in a terminal or a line every `seconds`, and adds to the run's curves.

    Loss and tokens/s are those since the last line, over all devices. The callback also counts the tokens trained on since the
    start or the resumption, and averages the loss of the last tenth of the steps, for the run's record.
    """

    def __init__(self, run: Run, steps: int, seconds: float = 10.0) -> None:
        self.run, self.steps, self.seconds = run, steps, seconds
        self.losses: deque[float] = deque(maxlen=max(1, steps // 10))
        self.total_tokens = 0.0
        self.started = self._since = 0.0
        self.first = self._shown = 0  # completed steps at the start, and at the last line
        self._tokens, self._loss = 0.0, 0.0  # since the last line
        self._step_tokens, self._step_loss = 0, 0.0  # of the current step, on this device
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
        loss, tokens = _sum_over_devices(trainer, self._step_loss, self._step_tokens)
        self._step_loss, self._step_tokens = 0.0, 0
        self.losses.append(loss)
        self.total_tokens += tokens
        self._tokens += tokens
        self._loss += loss
        if trainer.is_global_zero:
            self._show(trainer.global_step, loss)

    def _show(self, step: int, loss: float) -> None:
        now = time.monotonic()
        metrics = {"loss": loss}
        if self._bar is not None:
            self._bar.update()
        if now - self._since >= (min(1.0, self.seconds) if self._bar else self.seconds) or step == self.steps:
            mean, rate = self._loss / (step - self._shown), self._tokens / max(now - self._since, 1e-9)
            metrics["tokens_per_second"] = rate
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {mean:.4f}, {rate:,.0f} tokens/s")
            else:
                remaining = (self.steps - step) * (now - self.started) / max(1, step - self.first)
                logger.info(
                    f"step {step}/{self.steps}  loss {mean:.4f}  {rate:,.0f} tokens/s  {timedelta(seconds=round(remaining))} left"
                )
            self._tokens, self._loss, self._shown, self._since = 0.0, 0.0, step, now
        self.run.curve(step, metrics)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def mean(self) -> float:
        """Returns the mean loss of the last tenth of the steps."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])


class EarlyStop(OptimizerStepCallback):
    """Computes the held-out loss `checks` times, and stops the training after `patience` checks in a row without improvement.

    With `patience`, the weights of the best check are restored at the end. The first check is before the first step.
    """

    def __init__(self, run: Run, data: Documents, steps: int, checks: int = 10, patience: int = 0) -> None:
        self.run, self.data, self.patience = run, data, patience
        self.every = max(1, steps // checks)
        self.before = self.best = self.latest = math.inf
        self.best_step = self.missed = 0
        self._best_weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        if math.isinf(self.before):
            self._validate(trainer, module)
            self.before = self.best

    def on_step(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._validate(trainer, module)
            if self.patience and self.missed >= self.patience:
                if trainer.is_global_zero:
                    logger.info(
                        f"held-out loss has not fallen below {self.best:.4f} for {self.missed} looks: stopped at step "
                        f"{trainer.global_step}, step {self.best_step} is kept"
                    )
                trainer.should_stop = True

    def _validate(self, trainer: lightning.Trainer, module: Any) -> None:
        # with sharded weights, all devices must run the same number of batches, so each computes all of them
        share = (1, 0) if module.sharded else (trainer.world_size, trainer.global_rank)
        batches = self.data.held_out(*share)
        total, targets = _sum_over_devices(trainer, *module.held_out_loss(batches))
        self.latest = total / max(1, targets)
        if trainer.is_global_zero:
            self.run.curve(trainer.global_step, {"held_out_loss": self.latest})
        if self.latest < self.best:
            self.best, self.best_step, self.missed = self.latest, trainer.global_step, 0
            if self.patience:
                self._best_weights = {n: p.detach().to("cpu", copy=True) for n, p in module.student.trainable.items()}
        else:
            self.missed += 1

    def restore_best(self, module: Any, step: int) -> None:
        """Restores the weights of the best check; `step` is the last step of the training."""
        if self._best_weights and self.best_step != step:
            with torch.no_grad():
                for name, parameter in module.student.trainable.items():
                    parameter.copy_(self._best_weights[name])
            self.latest = self.best

    def state_dict(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("before", "best", "latest", "best_step", "missed")}
        return {**numbers, "kept": self._best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best_weights = state_dict.pop("kept")
        for name, value in state_dict.items():
            setattr(self, name, value)


def check_finite(parameters: Mapping[str, torch.Tensor], when: str) -> None:
    """Raises UserError if a parameter is NaN or infinite."""
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity {when}; {NOT_FINITE_HINT}")


def _sum_over_devices(trainer: lightning.Trainer, *values: float) -> list[float]:
    """Returns the sum of each value over all devices."""
    if trainer.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(sums)
    return [float(x) for x in sums]
