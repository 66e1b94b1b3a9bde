"""Quantizers of llm-compressor: `gptq` and `awq` (integer weights), `smoothquant` and `fp8` (8-bit weights and activations).

    python compress.py method=[gptq] method.gptq.bits=3 calibration.samples=256
    python compress.py method=[wanda,awq]
    python compress.py method=[fp8] method.fp8.scales=block

Asymmetric integers are not offered: compressed-tensors saves them in a shape that it does not load. Neither are static FP8
activations, which load as NaN.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from winnow.core.errors import UserError, raised_below
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import Checked, knob
from winnow.model.holders import EXPERT, LINEAR
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout, TensorLayout

_SCALES_WHAT_HAS_NO_WEIGHT = {"BloomForCausalLM"}  # the library would move scales of AWQ into its activation function
DRIVER = "winnow.method.oneshot_driver"
BLOCK = 128  # rows and columns of a block of FP8 weights that share a scale, and inputs of a group of activations


@dataclass(frozen=True)
class _OneShot(Checked):
    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, EXPERT)
    preload: ClassVar[tuple[str, ...]] = (DRIVER,)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("llmcompressor",)


@dataclass(frozen=True)
class _Grouped(_OneShot):
    """Symmetric integers with a scale a group of weights, as `rtn` stores them."""

    clipped_bits: ClassVar[int]  # at as many bits or fewer `scale=auto` is `mse`
    clipping: ClassVar[Mapping[str, float]] = {}  # how `mse` looks for the range, where not as the library does

    bits: int = knob(4, choices=(2, 3, 4, 8))
    group_size: int = knob(64, choices=(32, 64, 128))
    scale: str = knob("auto", choices=("auto", "minmax", "mse"), search=False)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        return plan.grouped(self.bits, self.group_size, _scale_bytes(plan))

    def _scheme(self, model: PreTrainedModel, **weights: Any) -> dict[str, Any]:
        """What the library's modifiers take: which layers are quantized, and how."""
        if self.scale == "mse" or (self.scale == "auto" and self.bits <= self.clipped_bits):
            weights |= {"observer": "memoryless_mse", "observer_kwargs": dict(self.clipping)}
        arguments = {"num_bits": self.bits, "type": "int", "symmetric": True, "group_size": self.group_size, **weights}
        return {"config_groups": {"all": {"targets": ["Linear"], "weights": arguments}}, "ignore": _ignored(model)}


@dataclass(frozen=True)
class GPTQ(_Grouped):
    """Rounds the weights column by column and makes up for each column's error in those still to come.

    Weights that a stage before has pruned are zero again in the end. `scale` is the range of a group that its integers span:
    `minmax` all of it, `mse` the part that rounds with the least error, `auto` `mse` at 3 bits or fewer. With
    `act_order=static` the columns of the largest activations come first, at no cost when the model is used. An interrupted
    run starts over.

    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
    Calibration: token batches of `calibration`, twice through each block: for the Hessian of each layer (X X^T of its
        inputs), and to hand on what the quantized block puts out.
    Cost: for T tokens, 4 N T operations for the two passes and, for each layer [out, in], 2 in^2 T for the Hessian, about
        in^3 to invert it and 2 out in^2 for the rounding (derived from the algorithm); on the device one block, its
        Hessians (4 in^2 bytes a layer) and one batch; in main memory the model and T hidden states.
    Writes: safetensors, compressed-tensors `pack-quantized`.
    Loaded by: transformers; vLLM at 4 and 8 bits.
    """

    perplexity_bound: ClassVar[float] = 1.01
    aggressive: ClassVar[Mapping[str, Any]] = {"bits": 2, "group_size": 128}
    clipped_bits: ClassVar[int] = 3

    damping: float = knob(0.01, low=1e-4, high=1.0, log=True, search=False)  # share of the Hessian's mean diagonal
    act_order: str = knob("static", choices=("static", "none"), search=False)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        seen = StageCost.calibrated(plan, calibration) + StageCost.hessians(plan, calibration)
        return (seen + StageCost.solved(plan) + StageCost.widened(plan)).then(StageCost.packed(plan))

    def __call__(self, lm: LM, run: Run) -> LM:
        order = {"actorder": self.act_order if self.act_order != "none" else None}
        scheme = self._scheme(lm.model, **order)

        from llmcompressor.modifiers.gptq import GPTQModifier, base

        recipe = GPTQModifier(**scheme, dampening_frac=self.damping, **order)
        with mock.patch.object(base, "quantize_weight", _keeping_zeros(base.quantize_weight)):
            return _calibrated(lm, run, "gptq", [recipe])


@dataclass(frozen=True)
class AWQ(_Grouped):
    """Scales up the input channels with large activations before rounding to nearest, and folds the inverse into the layer
    that feeds them; tries `grid` strengths for each and keeps the one whose output changes least.

    `scale` as for `gptq`, except that `auto` is `mse` at 2 bits. Layers that feed one another through different widths
    (values and outputs with grouped queries) are not scaled. An interrupted run starts over.

    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, eq. 4 and 5; weights in the scales as in AutoAWQ.
    Calibration: token batches of `calibration`, twice through each block, and `grid` + 1 times through the parts of it whose
        inputs are scaled.
    Cost: about 3 N T grid operations for T tokens (derived from the code); on the device one block, and the inputs and two
        outputs of its parts for all T tokens; in main memory the model and T hidden states.
    Writes: safetensors, compressed-tensors `pack-quantized`.
    Loaded by: transformers; vLLM at 4 and 8 bits.
    """

    perplexity_bound: ClassVar[float] = 1.01
    aggressive: ClassVar[Mapping[str, Any]] = {"bits": 2, "group_size": 128}
    clipped_bits: ClassVar[int] = 2
    # squared error over ranges down to a fifth: what is rounded to nearest has nothing else to make up for a poor grid
    clipping: ClassVar[Mapping[str, float]] = {"norm": 2.0, "maxshrink": 0.8, "grid": 20.0}

    grid: int = knob(20, low=3, high=100, search=False)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, counted

        inputs = max(t.shape[1] for t in plan.linears)
        held = StageCost(
            device_bytes=3 * 2 * counted(calibration).tokens * inputs
        )  # of one part, with two of its outputs
        seen = StageCost.calibrated(plan, calibration, passes=2 + 1.5 * self.grid) + StageCost.widened(plan)
        return (seen + held).then(StageCost.packed(plan))

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        super().check(plan, base, run)
        importlib.import_module(DRIVER)  # which keeps the library silent
        from llmcompressor.modifiers.transform.awq.dynamic_mappings import AWQ_DYNAMIC_MAPPING_REGISTRY
        from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY

        known = {*AWQ_MAPPING_REGISTRY, *AWQ_DYNAMIC_MAPPING_REGISTRY} - _SCALES_WHAT_HAS_NO_WEIGHT
        _check_known(plan.spec.name, "awq", known)

    def __call__(self, lm: LM, run: Run) -> LM:
        scheme = self._scheme(lm.model)

        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

        smoothing = AWQModifier(mappings=get_layer_mappings_from_model(lm.model), n_grid=self.grid)
        return _calibrated(lm, run, "awq", [smoothing, QuantizationModifier(**scheme)])


@dataclass(frozen=True)
class SmoothQuant(_OneShot):
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
    eager_because: ClassVar[str | None] = (
        "copies a number from the host for the scales of its activations at every step"
    )

    strength: float = knob(0.5, low=0.0, high=1.0)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return (StageCost.calibrated(plan, calibration) + StageCost.widened(plan)).then(StageCost.packed(plan))

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        super().check(plan, base, run)
        importlib.import_module(DRIVER)
        from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings, utils

        known = {*utils.MAPPINGS_REGISTRY, *dynamic_mappings.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY}
        _check_known(plan.spec.name, "smoothquant", known)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        return _in_8_bits(plan.with_linears(lambda name, t: _in_bytes(t, t.shape[0] * _scale_bytes(plan))))

    def __call__(self, lm: LM, run: Run) -> LM:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smoothing = SmoothQuantModifier(smoothing_strength=self.strength, mappings=_smoothquant_mappings(lm.model))
        rounding = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=_ignored(lm.model))
        return _calibrated(lm, run, "smoothquant", [smoothing, rounding])


@dataclass(frozen=True)
class FP8(_OneShot):
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
    eager_because: ClassVar[str | None] = (
        "copies a number from the host for the scales of its activations at every step"
    )

    scales: str = knob("channel", choices=("channel", "block"))

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost.streamed(plan).then(StageCost.packed(plan))

    def predict(self, plan: ModelLayout) -> ModelLayout:
        def change(name: str, t: TensorLayout) -> TensorLayout:
            rows, width = t.shape
            if self.scales == "channel":
                return _in_bytes(t, rows * _scale_bytes(plan))
            _check_block(name, width)
            return _in_bytes(t, math.ceil(rows / BLOCK) * (width // BLOCK) * _scale_bytes(plan))

        return _in_8_bits(plan.with_linears(change))

    def __call__(self, lm: LM, run: Run) -> LM:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        from winnow.method.oneshot_driver import oneshot

        scheme = {"channel": "FP8_DYNAMIC", "block": "FP8_BLOCK"}[self.scales]
        recipe = [QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=_ignored(lm.model))]
        oneshot(lm, run, "fp8", recipe)
        return lm.changed(lm.model)


def _calibrated(lm: LM, run: Run, name: str, recipe: list[Any]) -> LM:
    from winnow.data.calibration import calibration_batches
    from winnow.method.oneshot_driver import oneshot

    batches, digest = calibration_batches(lm, run)
    try:
        oneshot(lm, run, name, recipe, batches)
    except ValueError as error:  # of its tables of which layers feed which
        library = importlib.util.find_spec("llmcompressor")
        if library is None or not raised_below(error, Path(str(library.origin)).parent):
            raise
        raise UserError(
            f"method={name} does not suit {type(lm.model).__name__}: {str(error).splitlines()[0][:200]}; take method=gptq or rtn"
        ) from error
    lm.manifest["_notes"] = {"calibration_sha256": digest}
    return lm.changed(lm.model)


def _keeping_zeros(quantize_weight: Callable[..., Any]) -> Callable[..., Any]:
    """The library's rounding spreads errors over all weights of a row, pruned ones included."""

    def quantize(weights: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, Any, Any]:
        zeros = weights == 0
        rounded, losses, fallbacks = quantize_weight(weights=weights, **arguments)
        return rounded.masked_fill_(zeros, 0), losses, fallbacks

    return quantize


def _ignored(model: PreTrainedModel) -> list[str]:
    """Linear layers that are not of the decoder blocks, such as the head."""
    from torch import nn

    from winnow.model.layers import linears

    wanted = linears(model)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in wanted]


def _check_known(architecture: str, method: str, architectures: set[str]) -> None:
    """The library takes other architectures for Llama's, and changes what the model computes if that is not true."""
    if architecture not in architectures:
        raise UserError(
            f"method={method} does not know which layers of {architecture} feed which, so it cannot move scales between them; "
            f"take method=gptq or rtn"
        )


def _smoothquant_mappings(model: PreTrainedModel) -> Any:
    """Which norm feeds which layers.

    For Gemma 2 and 3 the library names the norm behind the attention, whose output is added to the residual stream; the
    one before the feed-forward layers is meant.
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


def _scale_bytes(plan: ModelLayout) -> int:
    """Scales have the type of the weights."""
    return next((t.memory_bytes // t.numel for t in plan.tensors.values() if t.linear), 2)


def _in_8_bits(plan: ModelLayout) -> ModelLayout:
    """Activations are rounded to 8 bits, too, and what is rounded passes no gradient on."""
    return dataclasses.replace(plan, layout="compressed-tensors", passes_gradients=False)


def _in_bytes(t: TensorLayout, scale_bytes: int) -> TensorLayout:
    """A weight stored in a byte a number, and its scales."""
    memory_bytes = t.memory_bytes + scale_bytes  # transformers computes in the model's own type
    return dataclasses.replace(t, disk_bytes=t.numel + scale_bytes, memory_bytes=memory_bytes, entries=2)
