"""Rounds weights to nearest: the simplest weight quantization, and the baseline for all others.

python compress.py method=[rtn] method.rtn.bits=4 method.rtn.group_size=64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM
from winnow.model.matrix_kinds import EXPERT, LINEAR

if TYPE_CHECKING:
    import torch

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout


@dataclass(frozen=True)
class RTN(BaseStage):
    """Symmetric integers with one scale a group of `group_size` weights, packed at exactly `bits` bits each.

    The scale spans the group's largest magnitude, so there is nothing to calibrate. Costs `bits + 16 / group_size` bits a
    weight on disk.

    Source: the usual baseline; its grid is compared with others in Frantar et al. 2022, arXiv:2210.17323, section 4.
    Calibration: none.
    Cost: reads and writes the N weights once; in main memory the model and its integers (derived from the code).
    Writes: safetensors, compressed-tensors `pack-quantized`.
    Loaded by: transformers; vLLM at 4 and 8 bits.
    """

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, EXPERT)
    preload: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    aggressive: ClassVar[Mapping[str, Any]] = {"bits": 2, "group_size": 128}

    bits: int = knob(4, choices=(2, 3, 4, 8))
    group_size: int = knob(64, choices=(32, 64, 128))

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("compressed_tensors",)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        return plan.grouped(self.bits, self.group_size)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost.streamed(plan).then(StageCost.packed(plan))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.model.layers import linears
        from winnow.model.packing import attach_scheme, quantize_linear

        attach_scheme(lm.model, self.bits, self.group_size)
        for linear in linears(lm.model).values():
            quantize_linear(linear, rtn_scale(linear.weight.data, self.bits, self.group_size))
        return StageResult(lm.with_model(lm.model))


def rtn_scale(weight_oi: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Returns scales [out, groups] of weights [out, in]: a group's largest magnitude over half the integer range."""
    groups = weight_oi.unflatten(-1, (-1, group_size))
    half_range = (2**bits - 1) / 2
    scale: torch.Tensor = groups.abs().amax(-1) / half_range
    return scale.clamp_min(1e-8)  # for a group of zeros (pruned), avoids a division by zero
