"""Trains a model from its (usually random) weights on a stream of documents; this made the embedded model.

python train.py experiment=nano
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import StageResult, knob
from winnow.method.trainable import Training
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrain(Training):
    """Full-parameter training with Muon for the matrices of the blocks and AdamW for the rest.

    Attributes:
        stream: how many documents to draw from the training stream of `run.calibration`; seen once, then again.
    """

    slot: ClassVar[Slot] = Slot.RECOVER
    matrices: ClassVar[tuple[str, ...] | None] = None

    steps: int = knob(6000, low=1, high=10_000_000, search=False)
    stream: int = knob(500_000, low=1, high=1_000_000_000, search=False)
    tokens_per_batch: int = knob(4096, low=32, high=100_000_000, search=False)
    learning_rate: float = knob(3e-3, low=1e-6, high=1.0, search=False)
    optimizer: str = knob("muon", choices=("muon", "adamw"), search=False)
    precision: str = knob("auto", choices=("auto", "32-true", "bf16-mixed", "bf16-true"), search=False)
    max_length: int = knob(256, low=8, high=1_000_000, search=False)
    save_dtype: str = knob("bfloat16", choices=("float32", "bfloat16", "float16"), search=False)
    checkpoint_minutes: float = knob(3.0, low=0.001, high=1e6, search=False)

    @property
    def document_count(self) -> int:
        return self.stream + self.held_out

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        parameters = sum(t.numel for t in plan.tensors.values())
        return self.cost(plan, calibration, parameters, adapters=False)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        import torch

        from winnow.model.packing import cast_weights

        logger.info(f"pretrain: drawing {self.document_count:,} documents")
        rows = self.encode_documents(lm, run)
        if self.precision_in(run.compute_dtype) != "bf16-true":
            cast_weights(lm.model, torch.float32)
        fitted = self.train(
            lm.model,
            rows,
            run,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=0.01,
            warmup=0.02,
        )
        cast_weights(lm.model, getattr(torch, self.save_dtype))
        return StageResult(lm.with_model(lm.model), {"training": fitted.record()})
