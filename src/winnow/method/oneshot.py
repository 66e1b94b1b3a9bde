"""Defines the weight quantizers of llm-compressor: `gptq` and `awq`.

    python compress.py method=[gptq] method.gptq.bits=3 calibration.samples=256
    python compress.py method=[wanda,awq]

Asymmetric integers are not offered: compressed-tensors saves them in a shape that it does not load. The base and the helpers
here also serve `winnow.method.oneshot_8bit`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from winnow.core.errors import UserError, raised_below
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM
from winnow.model.matrix_kinds import EXPERT, LINEAR

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

_AWQ_UNSUITED = {"BloomForCausalLM"}  # the library would move AWQ's scales into an activation function without weights
DRIVER = "winnow.method.oneshot_driver"


@dataclass(frozen=True)
class OneShot(BaseStage):
    """Base of the stages that llm-compressor runs."""

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, EXPERT)
    preload: ClassVar[tuple[str, ...]] = (DRIVER,)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("llmcompressor",)


@dataclass(frozen=True)
class _Grouped(OneShot):
    """Symmetric integers with a scale a group of weights, as `rtn` stores them."""

    clipped_bits: ClassVar[int]  # with this many bits or fewer, `scale=auto` means `mse`
    clipping: ClassVar[Mapping[str, float]] = {}  # parameters of the `mse` range search that differ from the library's

    bits: int = knob(4, choices=(2, 3, 4, 8))
    group_size: int = knob(64, choices=(32, 64, 128))
    scale: str = knob("auto", choices=("auto", "minmax", "mse"), search=False)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        return plan.grouped(self.bits, self.group_size, scale_bytes(plan))

    def _scheme(self, model: PreTrainedModel, **weights: Any) -> dict[str, Any]:
        """Returns arguments of the library's modifiers: which layers are quantized, and how."""
        if self.scale == "mse" or (self.scale == "auto" and self.bits <= self.clipped_bits):
            weights |= {"observer": "memoryless_mse", "observer_kwargs": dict(self.clipping)}
        arguments = {"num_bits": self.bits, "type": "int", "symmetric": True, "group_size": self.group_size, **weights}
        return {
            "config_groups": {"all": {"targets": ["Linear"], "weights": arguments}},
            "ignore": unquantized_linears(model),
        }


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

        reading = StageCost.calibrated(plan, calibration) + StageCost.hessians(plan, calibration)
        return (reading + StageCost.solved(plan) + StageCost.widened(plan)).then(StageCost.packed(plan))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        order = {"actorder": self.act_order if self.act_order != "none" else None}
        scheme = self._scheme(lm.model, **order)

        from llmcompressor.modifiers.gptq import GPTQModifier, base

        recipe = GPTQModifier(**scheme, dampening_frac=self.damping, **order)
        with mock.patch.object(base, "quantize_weight", _preserve_zeros(base.quantize_weight)):
            return quantize_calibrated(lm, run, "gptq", [recipe])


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
    # squared error over ranges down to a fifth: round to nearest has no other way to compensate for a poor grid
    clipping: ClassVar[Mapping[str, float]] = {"norm": 2.0, "maxshrink": 0.8, "grid": 20.0}

    grid: int = knob(20, low=3, high=100, search=False)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, count_tokens

        inputs = max(t.shape[1] for t in plan.linears)
        # inputs of one part of a block, and two of its outputs
        buffers = StageCost(device_bytes=3 * 2 * count_tokens(calibration).tokens * inputs)
        reading = StageCost.calibrated(plan, calibration, passes=2 + 1.5 * self.grid) + StageCost.widened(plan)
        return (reading + buffers).then(StageCost.packed(plan))

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        super().check(plan, base, run)
        importlib.import_module(DRIVER)  # it silences the library
        from llmcompressor.modifiers.transform.awq.dynamic_mappings import AWQ_DYNAMIC_MAPPING_REGISTRY
        from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY

        supported = {*AWQ_MAPPING_REGISTRY, *AWQ_DYNAMIC_MAPPING_REGISTRY} - _AWQ_UNSUITED
        check_architecture(plan.spec.name, "awq", supported)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        scheme = self._scheme(lm.model)

        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

        smoothing = AWQModifier(mappings=get_layer_mappings_from_model(lm.model), n_grid=self.grid)
        return quantize_calibrated(lm, run, "awq", [smoothing, QuantizationModifier(**scheme)])


def quantize_calibrated(lm: LM, run: Run, name: str, recipe: list[Any]) -> StageResult:
    """Applies the modifiers of `recipe` with calibration data.

    Raises:
        UserError: the library does not know which layers of the architecture feed which.
    """
    from winnow.data.calibration import calibration_batches
    from winnow.method.oneshot_driver import oneshot

    batches, digest = calibration_batches(lm, run)
    try:
        oneshot(lm, run, name, recipe, batches)
    except ValueError as error:  # raised by the library's tables of which layers feed which
        library = importlib.util.find_spec("llmcompressor")
        if library is None or not raised_below(error, Path(str(library.origin)).parent):
            raise
        raise UserError(
            f"method={name} does not suit {type(lm.model).__name__}: {str(error).splitlines()[0][:200]}; take method=gptq or rtn"
        ) from error
    return StageResult(lm.with_model(lm.model), {"calibration_sha256": digest})


def _preserve_zeros(quantize_weight: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the library's rounding, which spreads errors over all weights of a row, so that pruned weights stay zero."""

    def quantize(weights: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, Any, Any]:
        zeros = weights == 0
        rounded, losses, fallbacks = quantize_weight(weights=weights, **arguments)
        return rounded.masked_fill_(zeros, 0), losses, fallbacks

    return quantize


def unquantized_linears(model: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers outside the decoder blocks, such as the head."""
    from torch import nn

    from winnow.model.layers import linears

    quantized = linears(model)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]


def check_architecture(architecture: str, method: str, architectures: set[str]) -> None:
    """Raises UserError for an unsupported architecture: the library treats it as Llama, which can change its outputs."""
    if architecture not in architectures:
        raise UserError(
            f"method={method} does not know which layers of {architecture} feed which, so it cannot move scales between them; "
            f"take method=gptq or rtn"
        )


def scale_bytes(plan: ModelLayout) -> int:
    """Returns the bytes of a scale, which has the type of the weights."""
    return next((t.memory_bytes // t.numel for t in plan.tensors.values() if t.linear), 2)
