"""The one LightningModule of winnow: recovery, distillation and pretraining differ in what they pass to it.

The loss of a batch is the sum over its targets, divided by the targets of the whole optimizer step, all its batches on all
devices: so each token weighs the same however a step is cut up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from winnow.core.errors import UserError
from winnow.data.encoding import moved
from winnow.model.layers import decoder_blocks
from winnow.training import dist_env
from winnow.training.callbacks import WAY_OUT
from winnow.training.objective import CrossEntropy, Objective
from winnow.training.optimizer import build_optimizer
from winnow.training.packed_rows import fingerprint
from winnow.training.student import Student


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up, constant, then linear decay to zero over the last `decay` share of the steps."""

    learning_rate: float
    steps: int
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.01
    optimizer: str = "adamw"

    def factor(self, step: int) -> float:
        """Multiplier of the learning rate at `step`, from 0."""
        warmup = max(1, math.ceil(self.warmup * self.steps))
        decay = max(1, math.ceil(self.decay * self.steps))
        return max(0.0, min(1.0, (step + 1) / warmup, (self.steps - step) / decay))


class Recovery(lightning.LightningModule):
    """Trains the parameters of `student` that need a gradient, by `objective`."""

    def __init__(
        self, student: Student, schedule: Schedule, objective: Objective | None = None, sharded: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.schedule = schedule
        self.sharded = sharded
        # in a list, so that a teacher is no part of what is trained, spread over devices and checkpointed
        self._objective = [objective or CrossEntropy()]
        self.strict_loading = False  # checkpoints hold what is trained

    def configure_model(self) -> None:
        """Called by Lightning once the processes know one another."""
        if self.sharded:
            mixed = self.trainer.precision == "bf16-mixed"
            mesh: Any = self.device_mesh
            dist_env.shard(self.student, decoder_blocks(self.student.base), mesh["data_parallel"], mixed)
            self.student.__dict__.pop("trainable", None)  # other parameters now

    @property
    def objective(self) -> Objective:
        return self._objective[0]

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, index: int) -> dict[str, Any]:
        return moved(batch, device)

    def training_step(self, batch: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        total = self.objective(self.student, batch)
        if not total.isfinite():
            raise UserError(
                f"the loss is {total.item()} at step {self.trainer.global_step} on batch {fingerprint(batch)}; {WAY_OUT}"
            )
        share = total / max(1, batch["step_targets"])
        # Lightning divides by the batches of a step, and the mean over devices divides by these
        return {"loss": share * self.trainer.accumulate_grad_batches * self.trainer.world_size, "share": share.detach()}

    @torch.no_grad()
    def held_out_loss(self, batches: list[dict[str, Any]]) -> tuple[float, int]:
        """Sum of the objective over held-out batches, and its targets."""
        from winnow.data.encoding import IGNORED

        was = self.student.training
        self.student.eval()
        total, targets = 0.0, 0
        for batch in batches:
            moved = self.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.forward_context():
                total += float(self.objective(self.student, moved))
            targets += int((batch["targets"] != IGNORED).sum())
        self.student.train(was)
        return total, targets

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # what is frozen comes with the model, and quantized weights could not be put back
        trained = {f"student.model.{name}" for name in self.student.trainable}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}

    def configure_optimizers(self) -> Any:
        s = self.schedule
        optimizer = build_optimizer(self.student.model, s.optimizer, s.learning_rate, s.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, s.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
