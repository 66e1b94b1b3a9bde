"""The one LightningModule of winnow: recovery, pretraining and (later) distillation differ in what they pass to it.

Loss is summed over target tokens and divided by their number in the whole batch, so that batches of unequal length weigh
each token the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn

from winnow.recovery.data import IGNORED
from winnow.recovery.optimizer import build_optimizer


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


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over target tokens. logits [B, T, V], labels [B, T] (`IGNORED` where there is no target)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


class Recovery(lightning.LightningModule):
    """Trains the parameters of `model` that need a gradient on batches of `winnow.recovery.data`."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        loss = token_loss(output.logits, batch["labels"])
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        s = self.schedule
        optimizer = build_optimizer(self.model, s.optimizer, s.learning_rate, s.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, s.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
