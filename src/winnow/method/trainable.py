"""Provides the base of the stages that train: their settings, documents, cost and training run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, knob
from winnow.model.lm import LM
from winnow.model.spec import context_of

if TYPE_CHECKING:
    from winnow.data.encoding import Encoded
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout
    from winnow.training.fit import Fitted
    from winnow.training.objective import Objective
    from winnow.training.student import Student

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training(BaseStage):
    """Base of the stages that train, with the settings of a training.

    Attributes:
        steps: optimizer steps, each of about `tokens_per_batch` tokens over all devices.
        tokens_per_device: tokens on a device at a time; 0: determined once by doubling under the memory limit.
        max_length: documents are cut to this many tokens, at most the model's context.
        precision: `32-true`, or `bf16-mixed` (products in bfloat16); `auto`: the fastest on the device.
        held_out: number of documents to validate on.
        patience: stop after this many of the ten validation checks without improvement; 0: never.
        checkpoint_minutes: minutes between checkpoints, from which the same command resumes.
    """

    preload: ClassVar[tuple[str, ...]] = ("winnow.training.fit",)

    steps: int = knob(100, low=1, high=10_000_000, search=False)
    tokens_per_batch: int = knob(2048, low=32, high=100_000_000, search=False)
    tokens_per_device: int = knob(0, low=0, high=100_000_000, search=False)
    max_length: int = knob(512, low=8, high=1_000_000, search=False)
    precision: str = knob("auto", choices=("auto", "32-true", "bf16-mixed"), search=False)
    held_out: int = knob(0, low=0, high=100_000, search=False)
    patience: int = knob(0, low=0, high=10, search=False)
    checkpoint_minutes: float = knob(10.0, low=0.001, high=1e6, search=False)

    def precision_in(self, dtype: str) -> str:
        """Returns the precision to train in on a device where products are fastest in `dtype`."""
        from winnow.hardware.compute import training_precision

        return training_precision(dtype) if self.precision == "auto" else self.precision

    def cast_frozen(self, model: Any, run: Run) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which frozen weights of `model` are in single precision if the training is."""
        import torch

        from winnow.model.packing import compute_in_dtype

        single = self.precision_in(run.compute_dtype) == "32-true"
        return compute_in_dtype(model, torch.float32) if single else contextlib.nullcontext()

    @property
    def document_count(self) -> int:
        """Number of documents to draw: four times the need of the steps at 64 tokens each, so that few are read twice."""
        return max(64, self.steps * self.tokens_per_batch // 16) + self.held_out

    def cost(
        self, plan: ModelLayout, calibration: Calibration, trained: int, *, tokens_per_batch: int = 0, **how: bool
    ) -> StageCost:
        """Returns the cost of these steps on a model of this layout, with `trained` parameters that need a gradient.

        Args:
            tokens_per_batch: overrides the setting where more than the documents is read.
            how: keyword arguments of `StageCost.trained`.
        """
        from winnow.estimate.cost import StageCost

        return StageCost.trained(
            plan,
            calibration,
            self.steps,
            tokens_per_batch or self.tokens_per_batch,
            trained,
            self.document_count,
            self.precision_in(plan.compute_dtype) != "32-true",
            device_tokens=self.tokens_per_device,
            **how,
        )

    def encode_documents(self, lm: LM, run: Run, calibration: Calibration | None = None) -> list[Encoded]:
        """Returns the documents to train on, cut to the model's context; logs how many were cut."""
        from winnow.data.corpus import documents
        from winnow.data.encoding import encode

        context = context_of(lm.model.config)
        longest = min(self.max_length, context or self.max_length)
        rows = encode(documents(calibration or run.calibration, self.document_count, run.seed), lm.tokenizer, longest)
        cut = sum(1 for row in rows if row.cut)
        if cut:
            logger.info(f"{cut:,} of {len(rows):,} documents are longer than {longest} tokens and were cut")
        return rows

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that a checkpoint must match; how often it is saved and the batch on a device are free."""
        free = ("checkpoint_minutes", "tokens_per_device")
        return {f"{self.option}.{k}": v for k, v in dataclasses.asdict(self).items() if k not in free}

    def train(
        self,
        model: Any,
        rows: Sequence[Encoded],
        run: Run,
        *,
        learning_rate: float,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        objective: Objective | None = None,
        student: Student | None = None,
    ) -> Fitted:
        """Trains the parameters of `model` that need a gradient, in place."""
        from winnow.hardware.compute import BFLOAT16, slow_dtype_warning
        from winnow.training.fit import Batching, fit
        from winnow.training.module import Schedule

        precision = self.precision_in(run.compute_dtype)
        slow = slow_dtype_warning(BFLOAT16, run.device) if precision.startswith("bf16") else ""
        if slow:
            logger.info(f"{self.option}.precision={self.precision}: {slow}")
        schedule = Schedule(learning_rate, self.steps, warmup, weight_decay=weight_decay, optimizer=optimizer)
        fitted = fit(
            model,
            rows,
            schedule,
            Batching(self.tokens_per_batch, self.tokens_per_device, self.held_out, self.patience),
            run,
            precision=precision,
            objective=objective,
            student=student,
            checkpoint_minutes=self.checkpoint_minutes,
            settings=self._settings(),
        )
        held_out = "" if fitted.held_out_loss is None else f", held out {fitted.held_out_loss:.4f}"
        logger.info(f"loss {fitted.loss:.4f} over the last tenth of {fitted.steps} steps{held_out}")
        return fitted
