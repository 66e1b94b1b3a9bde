"""Quantizes weights to 8 and 4 bits with bitsandbytes: `int8` (LLM.int8), `nf4` and `fp4`.

transformers supports these formats: the saved folder loads with plain `from_pretrained` where bitsandbytes is installed.

    python compress.py method=[nf4]
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM
from winnow.model.matrix_kinds import LINEAR, TRANSPOSED

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout, TensorLayout

BLOCK = 64  # weights that share an 8-bit scale
BLOCKS = 256  # blocks whose scales share a 32-bit one
CODES_BYTES = 4 * 16 + 4 * 256  # the 16 values of a weight and the 256 of a scale, stored with every layer
STATE_BYTES = 170  # a layer's shape and type, as JSON
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * BLOCKS)  # 4.127


def _reload_quantized(lm: LM, run: Run, **settings: Any) -> PreTrainedModel:
    """Writes the dense model to a scratch folder and loads it through transformers' bitsandbytes loader."""
    import logging
    import shutil

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hides remarks on optional kernels at import
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from winnow.model.quiet import quiet
    from winnow.model.unfused import fused
    from winnow.training.dist_env import local_device, world

    scratch = run.folder / f"dense-{world().rank}"
    try:
        with quiet():
            with fused(lm.model):
                lm.model.save_pretrained(scratch)
            model = AutoModelForCausalLM.from_pretrained(
                scratch,
                dtype=_half(lm.model.dtype),
                attn_implementation=lm.loading.attn_implementation,
                quantization_config=BitsAndBytesConfig(**settings),
                trust_remote_code=lm.loading.trust_remote_code,
                device_map={"": local_device(run)},
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    keep_packing(model)
    return model.eval()  # type: ignore[no-any-return]


def keep_packing(model: nn.Module) -> None:
    """Turns off the repacking of 4-bit weights: on CPUs with AVX512-BF16 a forward pass would repack them for speed, after
    which they cannot be saved and pass no gradient.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _half(dtype: torch.dtype) -> torch.dtype:
    """Returns the 16-bit type that bitsandbytes computes in: the model's own type if it has 16 bits, else bfloat16."""
    import torch

    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


@dataclass(frozen=True)
class Int8(BaseStage):
    """Vector-wise 8-bit products: a scale for each row of the weights and each token, with input features above `threshold`
    kept in 16 bits.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 3 (LLM.int8).
    Calibration: none.
    Cost: time of writing and reading the model once; main memory of the dense and of the quantized model. Derived from the
        code.
    Writes: safetensors, bitsandbytes' 8-bit layout.
    Loaded by: transformers with bitsandbytes.
    """

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, TRANSPOSED)
    preload: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    perplexity_bound: ClassVar[float] = 1.005
    eager_reason: ClassVar[str | None] = "looks for outliers on the host at every step"

    threshold: float = knob(6.0, low=0.0, high=100.0, search=False)  # section 3.2; 0 turns the decomposition off

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("bitsandbytes",)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        def change(name: str, t: TensorLayout) -> TensorLayout:
            size = t.numel + 4 * t.shape[0]  # with one scale for each row
            return dataclasses.replace(t, disk_bytes=size + 1, memory_bytes=size, entries=3)  # + 1: the layout's number

        return dataclasses.replace(plan.in_16_bits().with_linears(change), layout="int8")

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost.reloaded(plan, bits=8)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        model = _reload_quantized(lm, run, load_in_8bit=True, llm_int8_threshold=self.threshold)
        return StageResult(lm.with_model(model))


@dataclass(frozen=True)
class _FourBit(BaseStage):
    """Base of the 4-bit quantizers of bitsandbytes."""

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, TRANSPOSED)
    preload: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    values: ClassVar[str]  # bitsandbytes' name for the values of the 16 codes

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("bitsandbytes",)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        def change(name: str, t: TensorLayout) -> TensorLayout:
            blocks = math.ceil(t.numel / BLOCK)
            size = math.ceil(t.numel / 2) + blocks + 4 * math.ceil(blocks / BLOCKS) + CODES_BYTES
            return dataclasses.replace(t, disk_bytes=size + STATE_BYTES, memory_bytes=size, entries=6)

        return dataclasses.replace(plan.in_16_bits().with_linears(change), layout="4bit")

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost.reloaded(plan, bits=BITS)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        model = _reload_quantized(
            lm,
            run,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.values,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_half(lm.model.dtype),
        )
        return StageResult(lm.with_model(model))


@dataclass(frozen=True)
class NF4(_FourBit):
    """4-bit NormalFloat: each weight is one of 16 quantiles of the normal distribution, times the scale of its block of 64;
    the scales are quantized once more to 8 bits (0.127 bits a weight).

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 (NF4, double quantization).
    Calibration: none.
    Cost: time of writing and reading the model once; main memory of the dense and of the quantized model. Derived from the
        code.
    Writes: safetensors, bitsandbytes' 4-bit layout.
    Loaded by: transformers with bitsandbytes.
    """

    perplexity_bound: ClassVar[float] = 1.01
    values: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(_FourBit):
    """4-bit floating point: each weight is a sign, two bits of exponent and one of mantissa, times the scale of its block of
    64; scales as for `nf4`, which is the better choice for weights that are normally distributed.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 4 (4-bit Float, compared with NF4); double quantization: section 3.
    Calibration: none.
    Cost: time of writing and reading the model once; main memory of the dense and of the quantized model. Derived from the
        code.
    Writes: safetensors, bitsandbytes' 4-bit layout.
    Loaded by: transformers with bitsandbytes.
    """

    perplexity_bound: ClassVar[float] = 1.01
    values: ClassVar[str] = "fp4"
