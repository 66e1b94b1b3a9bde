"""Defines winnow's only LightningModule; recovery, distillation and pretraining differ in the arguments they pass to it.

The loss of a batch is the sum over its targets, divided by the targets of the whole optimizer step (all batches on all devices).
Each token therefore has the same weight however a step is divided into batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from winnow.core.errors import UserError
from winnow.data.encoding import to_device
from winnow.model.layers import decoder_blocks
from winnow.training import dist_env
from winnow.training.callbacks import NOT_FINITE_HINT
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
        """Returns the multiplier of the learning rate at `step`, counted from 0."""
        warmup = max(1, math.ceil(self.warmup * self.steps))
        decay = max(1, math.ceil(self.decay * self.steps))
        return max(0.0, min(1.0, (step + 1) / warmup, (self.steps - step) / decay))


class Recovery(lightning.LightningModule):
    """Trains the parameters of `student` that need a gradient, with the loss of `objective`."""

    def __init__(
        self, student: Student, schedule: Schedule, objective: Objective | None = None, sharded: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.schedule = schedule
        self.sharded = sharded
        # the list hides a teacher from Lightning, which would otherwise train, shard and checkpoint it
        self._objective = [objective or CrossEntropy()]
        self.strict_loading = False  # checkpoints hold only the trained parameters

    def configure_model(self) -> None:
        """Shards the model; Lightning calls this once the processes are connected."""
        if self.sharded:
            mixed = self.trainer.precision == "bf16-mixed"
            mesh: Any = self.device_mesh
            dist_env.shard(self.student, decoder_blocks(self.student.base), mesh["data_parallel"], mixed)
            self.student.__dict__.pop("trainable", None)  # sharding replaced the cached parameters

    @property
    def objective(self) -> Objective:
        return self._objective[0]

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, index: int) -> dict[str, Any]:
        return to_device(batch, device)

    def training_step(self, batch: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        total = self.objective(self.student, batch)
        if not total.isfinite():
            raise UserError(
                f"the loss is {total.item()} at step {self.trainer.global_step} on batch {fingerprint(batch)}; {NOT_FINITE_HINT}"
            )
        share = total / max(1, batch["step_targets"])
        # Lightning divides by the number of batches of a step, and the mean over devices by the number of devices
        return {"loss": share * self.trainer.accumulate_grad_batches * self.trainer.world_size, "share": share.detach()}

    @torch.no_grad()
    def held_out_loss(self, batches: list[dict[str, Any]]) -> tuple[float, int]:
        """Returns the sum of the objective over held-out batches, and the number of targets."""
        from winnow.data.encoding import IGNORED

        was_training = self.student.training
        self.student.eval()
        total, targets = 0.0, 0
        for batch in batches:
            device_batch = self.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.forward_context():
                total += float(self.objective(self.student, device_batch))
            targets += int((batch["targets"] != IGNORED).sum())
        self.student.train(was_training)
        return total, targets

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # frozen weights come with the model, and quantized weights could not be restored
        trained = {f"student.model.{name}" for name in self.student.trainable}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}

    def configure_optimizers(self) -> Any:
        s = self.schedule
        optimizer = build_optimizer(self.student.model, s.optimizer, s.learning_rate, s.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, s.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
