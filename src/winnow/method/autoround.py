"""AutoRound tunes, block by block, in which direction each weight is rounded and the range of each group.

    python compress.py method=[autoround] method.autoround.bits=3
    python compress.py method=[wanda,autoround] method.autoround.iters=50
    python compress.py method=[autoround] method.autoround.bits=2 method.autoround.format=auto_round

Asymmetric integers are not offered: for them the library silently writes AWQ's packing, which few runtimes read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM
from winnow.model.matrix_kinds import LINEAR

if TYPE_CHECKING:
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout, TensorLayout

DRIVER = "winnow.method.autoround_driver"
WORD = 32  # bits of the integers that the auto_round format packs into
SCALES_TRIED = 300  # with `iters=0`, for each group


@dataclass(frozen=True)
class AutoRound(BaseStage):
    """Learns by signed gradient descent to round up or down so that each decoder block puts out what it did before.

    With `iters=0` nothing is learnt: the scale of each group is searched, weighted by the activations, and weights round to
    nearest. `iters=50` takes a quarter of the default's time, at little or no loss. `format=llm_compressor` loads as dense
    weights in transformers; `format=auto_round` stays packed there, and is unpacked at every forward, which is slow on
    processors.

    Source: Cheng et al. 2023, arXiv:2309.05516, section 3 (eq. 3 to 5, algorithm 1).
    Calibration: token batches of `calibration`, in rows as long as the longest document; `batch_size` rows an iteration.
    Cost: time about 6 N B per iteration for N parameters and B = batch_size x T tokens, and three passes of 2 N over all
        tokens; device memory of one block, 20 bytes for each of its parameters, and the activations of B tokens; main memory
        of the model and twice the hidden states of all tokens. All derived from the code. A run that dies goes on at the
        block it had reached.
    Writes: safetensors, compressed-tensors `pack-quantized` or auto_round's GPTQ-like packing.
    Loaded by: transformers; vLLM (`llm_compressor`: 4 and 8 bits).
    """

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR,)
    preload: ClassVar[tuple[str, ...]] = (DRIVER,)
    perplexity_bound: ClassVar[float] = 1.01
    aggressive: ClassVar[Mapping[str, Any]] = {"bits": 2, "group_size": 128}

    bits: int = knob(4, choices=(2, 3, 4, 8))
    group_size: int = knob(64, choices=(32, 64, 128))
    iters: int = knob(200, low=0, high=2000, search=False)
    batch_size: int = knob(8, low=1, high=128, search=False)
    format: str = knob("llm_compressor", choices=("llm_compressor", "auto_round"), search=False)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("auto_round", "compressed_tensors")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        grouped = plan.grouped(self.bits, self.group_size, 4 if plan.dtype == "float32" else 2)
        if self.format == "llm_compressor":
            return grouped

        def change(name: str, t: TensorLayout) -> TensorLayout:
            rows, width = t.shape
            _check_words(name.removesuffix(".weight"), rows)
            groups = width // self.group_size
            size = rows * width * self.bits // 8 + groups * rows * self.bits // 8 + groups * rows * 2
            return dataclasses.replace(t, disk_bytes=size, memory_bytes=size, entries=3)  # weights, zero points, scales

        return dataclasses.replace(plan.in_16_bits().with_linears(change), layout="auto-round")

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, count_tokens

        data, passes = count_tokens(calibration), StageCost.calibrated(plan, calibration, passes=3)
        longest = min(calibration.max_length, 2 * data.tokens / calibration.samples)  # an estimate
        tokens = min(self.batch_size * longest, data.tokens)  # in one iteration
        block = sum(t.numel for t in plan.largest_block if t.linear)
        tuning = StageCost(
            flops=self.iters * 6 * tokens * plan.linear_parameters,
            traffic_bytes=(self.iters or SCALES_TRIED) * 60 * plan.linear_parameters,
            # also the hidden states of tuned blocks, and the best rounding so far
            host_bytes=passes.host_bytes + 4 * block,
            device_bytes=20 * block + 2 * passes.device_bytes * tokens / data.batch_tokens,
        )
        return (passes + tuning).then(StageCost.packed(plan))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        import torch

        from winnow.data.calibration import calibration_batches
        from winnow.model.packing import attach_scheme, cast_weights

        model = lm.model
        if self.format == "auto_round" and model.dtype == torch.float32:
            cast_weights(model, torch.bfloat16)  # the format computes in 16 bits
            model.config.dtype = torch.bfloat16
        batches, digest = calibration_batches(lm, run)

        from winnow.method import autoround_driver as driver
        from winnow.method.checkpoint import checkpoint_of

        checkpoint = checkpoint_of(self, lm, run, digest)
        attach_scheme(model, self.bits, self.group_size)
        tuning = driver.Tuning(self.bits, self.group_size, self.iters, self.batch_size)
        driver.tune_blocks(lm, run, tuning, driver.rows_of(batches), checkpoint)
        if self.format == "auto_round":
            driver.pack_for_auto_round(model, self.bits, self.group_size)
        return StageResult(lm.with_model(model), {"calibration_sha256": digest})


def _check_words(name: str, outputs: int) -> None:
    """Raises UserError if the outputs of a layer do not fill whole words of the auto_round format."""
    if outputs % WORD:
        raise UserError(
            f"method.autoround.format=auto_round packs {WORD} outputs together, and {name} has {outputs}; "
            f"take format=llm_compressor"
        )
