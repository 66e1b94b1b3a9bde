"""Defines the 8-bit quantizers of llm-compressor, for weights and activations: `smoothquant` and `fp8`.

    python compress.py method=[smoothquant] method.smoothquant.strength=0.8
    python compress.py method=[fp8] method.fp8.scales=block

Static FP8 activations are not offered: they load as NaN.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.knobs import StageResult, knob
from winnow.method.oneshot import (
    DRIVER,
    OneShot,
    check_architecture,
    quantize_calibrated,
    scale_bytes,
    unquantized_linears,
)
from winnow.model.lm import LM
from winnow.model.matrix_kinds import LINEAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout, TensorLayout

BLOCK = 128  # rows and columns of a block of FP8 weights with one scale, and inputs of a group of activations


@dataclass(frozen=True)
class SmoothQuant(OneShot):
    """8-bit integer weights and activations, after part of the activations' range is moved into the weights.

    Weights have a scale an output, activations one a token, found when the model runs. `strength` is how much of the range
    is moved: 0 none of it, 1 all. An interrupted run starts over.

    Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4 (`strength` is its alpha).
    Calibration: token batches of `calibration`, twice through each block, for the range of each input channel.
    Cost: 4 N T operations for T tokens (derived from the code); on the device one block and one batch; in main memory the
        model and T hidden states.
    Writes: safetensors, compressed-tensors `int-quantized`.
    Loaded by: transformers, which rounds activations to the 8 bits and multiplies in the model's type; vLLM, which
        multiplies integers.
    """

    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR,)  # transformers reads no experts of this format
    perplexity_bound: ClassVar[float] = 1.01
    eager_reason: ClassVar[str | None] = "copies a number from the host for the scales of its activations at every step"

    strength: float = knob(0.5, low=0.0, high=1.0)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return (StageCost.calibrated(plan, calibration) + StageCost.widened(plan)).then(StageCost.packed(plan))

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        super().check(plan, base, run)
        importlib.import_module(DRIVER)
        from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings, utils

        supported = {*utils.MAPPINGS_REGISTRY, *dynamic_mappings.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY}
        check_architecture(plan.spec.name, "smoothquant", supported)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        return _activations_in_8_bits(plan.with_linears(lambda name, t: _in_bytes(t, t.shape[0] * scale_bytes(plan))))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smoothing = SmoothQuantModifier(smoothing_strength=self.strength, mappings=_smoothquant_mappings(lm.model))
        rounding = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=unquantized_linears(lm.model))
        return quantize_calibrated(lm, run, "smoothquant", [smoothing, rounding])


@dataclass(frozen=True)
class FP8(OneShot):
    """8-bit floats (E4M3) for weights and activations, whose scales are found when the model runs.

    `scales=channel` gives weights a scale an output and activations one a token; `scales=block` one a block of 128 by 128
    weights and one every 128 inputs of a token.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (E4M3); blocks as in DeepSeek-V3, arXiv:2412.19437,
        section 3.3.2.
    Calibration: none.
    Cost: reads and writes the N weights once; one block on the device.
    Writes: safetensors, compressed-tensors `float-quantized`.
    Loaded by: transformers, which rounds activations to the 8 bits (those of experts not) and multiplies in the model's
        type; vLLM, which multiplies 8-bit floats where the GPU does.
    """

    perplexity_bound: ClassVar[float] = 1.01
    eager_reason: ClassVar[str | None] = "copies a number from the host for the scales of its activations at every step"

    scales: str = knob("channel", choices=("channel", "block"))

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost.streamed(plan).then(StageCost.packed(plan))

    def predict(self, plan: ModelLayout) -> ModelLayout:
        def change(name: str, t: TensorLayout) -> TensorLayout:
            rows, width = t.shape
            if self.scales == "channel":
                return _in_bytes(t, rows * scale_bytes(plan))
            _check_block(name, width)
            return _in_bytes(t, math.ceil(rows / BLOCK) * (width // BLOCK) * scale_bytes(plan))

        return _activations_in_8_bits(plan.with_linears(change))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        from winnow.method.oneshot_driver import oneshot

        scheme = {"channel": "FP8_DYNAMIC", "block": "FP8_BLOCK"}[self.scales]
        recipe = [QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=unquantized_linears(lm.model))]
        oneshot(lm, run, "fp8", recipe)
        return StageResult(lm.with_model(lm.model))


def _smoothquant_mappings(model: PreTrainedModel) -> Any:
    """Returns which norm feeds which layers.

    For Gemma 2 and 3 the library wrongly names the norm after the attention, whose output is added to the residual stream;
    this function names the norm before the feed-forward layers.
    """
    from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings, utils

    if any(name.endswith("pre_feedforward_layernorm") for name, _ in model.named_modules()):
        attention, feed_forward = utils.DEFAULT_SMOOTHQUANT_MAPPINGS
        return [attention, (feed_forward.balance_layers, "re:.*pre_feedforward_layernorm$")]
    return dynamic_mappings.get_layer_mappings_from_model(model)


def _check_block(name: str, width: int) -> None:
    if width % BLOCK:
        raise UserError(
            f"scales=block takes widths that are multiples of {BLOCK}, not {width} ({name}); take scales=channel"
        )


def _activations_in_8_bits(plan: ModelLayout) -> ModelLayout:
    """Returns the layout with activations in 8 bits; rounded activations pass no gradients."""
    return dataclasses.replace(plan, layout="compressed-tensors", passes_gradients=False)


def _in_bytes(t: TensorLayout, bytes_of_scales: int) -> TensorLayout:
    """Returns the layout of a weight with one byte a number, and its scales."""
    memory_bytes = t.memory_bytes + bytes_of_scales  # transformers computes in the model's own type
    return dataclasses.replace(t, disk_bytes=t.numel + bytes_of_scales, memory_bytes=memory_bytes, entries=2)
