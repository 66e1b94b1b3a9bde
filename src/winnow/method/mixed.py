"""Mixed-precision quantization chooses the bits of each layer by its effect on the predictions, under an average target.

python compress.py method=[mixed] method.mixed.bits=2.5
"""

from __future__ import annotations

import logging
import math
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
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)

WIDTHS = (2, 3, 4, 8)  # bits that compressed-tensors packs; without 3 a searched recipe can lose to a uniform one
GRID = 1 << 16  # most steps that a budget is divided into; nearly all shapes need fewer, and are solved exactly


@dataclass(frozen=True)
class Mixed(BaseStage):
    """Gives each linear layer 2, 3, 4 or 8 bits so that the model's predictions move least at an average of `bits` bits.

    The average is over the linear weights of the blocks and is never exceeded; scales come on top, one of 16 bits a group at
    every width, so an average of 3 is as large as `rtn` at 3 bits and the same `group_size`. Weights are rounded to nearest.
    Layers that servers fuse (queries, keys and values; gate and up) share a width.

    Every width of every layer is scored once (see `winnow.method.sensitivity`); the scores are kept beside the scratch folders
    of the runs (`outputs/scratch`), so another target for the same model and calibration is only a knapsack problem, solved
    in milliseconds. What is found is then compared with the largest uniform recipe that is not larger, on the half of the
    calibration data that was not used for scoring, and refused if it is the worse of the two.

    Source: multiple-choice knapsack over second-order sensitivities, as in HAWQ-V2, arXiv:1911.03852, section 3 (there the
        trace of the Hessian times the squared error; here the Fisher information along the error itself, arXiv:1412.1193).
    Calibration: texts without labels; one half to score the layers, the other to compare with the uniform recipe.
    Cost: for N parameters in L blocks and T tokens in either half (from the code): scoring is two forwards, one backward
        and, for each of the 4 widths, the products of another forward, 14 N T operations; comparing is 6 N T. On the
        device one block, its 4 rounding errors and the activations of one batch: about 10 N / L bytes of weights; in main
        memory the model and L T hidden states (for 80 blocks of width 8,192 and 32,768 tokens 43 GB: take fewer or shorter
        texts where that is too much). Measured on the embedded model with the default calibration, on one core: scoring
        3.3 s, comparing 1.5 s, another target 1 ms and the comparison; the allocation of 80 blocks takes 15 to 120 ms.
        A run that dies between scoring and saving goes on with the kept scores.
    Writes: compressed-tensors `pack-quantized`, one group of the configuration a width.
    Loaded by: transformers with compressed-tensors; vLLM where its kernels take all the widths (older releases: 4 and 8
        bits only).
    """

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR,)
    preload: ClassVar[tuple[str, ...]] = ("compressed_tensors",)
    perplexity_bound: ClassVar[float] = 1.02
    aggressive: ClassVar[Mapping[str, Any]] = {"bits": 2.25}

    bits: float = knob(3.0, low=2.0, high=8.0, search_range=(2.0, 4.5))
    group_size: int = knob(64, choices=(32, 64, 128))

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("compressed_tensors",)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        if getattr(plan.config.get_text_config(decoder=True), "num_kv_shared_layers", None):
            raise UserError(
                "method=[mixed]: layers of this model share keys and values and cannot be scored; use method=[rtn]"
            )
        return plan.grouped(self.bits, self.group_size)

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        super().check(plan, base, run)
        _check_halves(run.calibration.samples)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, count_tokens

        data, spec = count_tokens(calibration), plan.spec
        linears = [t for t in plan.largest_block if t.linear]
        width = plan.memory_bytes / sum(t.numel for t in plan.tensors.values())
        # on half of the texts: two forwards, a backward to the inputs, a product for each width; then three forwards
        passes = StageCost.calibrated(plan, calibration, passes=(3 + len(WIDTHS) + 3) / 2)
        buffers = StageCost(
            host_bytes=data.tokens / 2 * spec.hidden_size * width * (spec.layers - 1)  # the inputs of all blocks
            + 16 * calibration.max_length * spec.vocab_size,  # logits of a text, their softmax and gradient
            matmuls=2 * passes.matmuls + 3 * data.shapes,  # of the backward in both halves, and of the head
            device_bytes=len(WIDTHS) * sum(t.memory_bytes for t in linears)
            + 12 * max((t.numel for t in linears), default=0)  # one matrix during rounding
            + 2 * data.batch_tokens / 2 * width * (8 * spec.hidden_size + 4 * spec.intermediate_size),  # activations
        )
        return (passes + buffers).then(StageCost.packed(plan))

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.data.calibration import calibration_batches
        from winnow.method.rtn import rtn_scale
        from winnow.method.sensitivity import divergences, halves, unit_of
        from winnow.model.layers import linears
        from winnow.model.packing import attach_scheme, quantize_linear

        batches, digest = calibration_batches(lm, run)
        _check_halves(sum(len(batch) for batch in batches))
        scoring_half, comparison_half = halves(batches)
        layers = linears(lm.model)
        sizes: dict[str, int] = {}
        for name, linear in layers.items():
            sizes[unit_of(name)] = sizes.get(unit_of(name), 0) + linear.weight.numel()
        recipe = allocate(self._scores(lm, run, scoring_half, digest, list(sizes)), sizes, self.bits)
        average = sum(width * sizes[unit] for unit, width in recipe.items()) / sum(sizes.values())

        uniform = max(width for width in WIDTHS if width <= self.bits)
        widths = {name: recipe[unit_of(name)] for name in layers}
        recipes = [widths, dict.fromkeys(layers, uniform)]
        mixed_divergence, uniform_divergence = divergences(lm.model, comparison_half, recipes, self.group_size, run)
        logger.info(
            f"mixed: {average:.3f} bits, {mixed_divergence:.4f} nats a token from the model's predictions; {uniform} bits, "
            f"{uniform_divergence:.4f}"
        )
        if mixed_divergence > uniform_divergence:
            raise UserError(
                f"method.mixed.bits={self.bits:g}: the recipe found is worse than {uniform} bits everywhere "
                f"({mixed_divergence:.4f} against {uniform_divergence:.4f} nats a token); use method=[rtn] "
                f"method.rtn.bits={uniform} method.rtn.group_size={self.group_size}, or raise calibration.samples"
            )
        attach_scheme(lm.model, widths, self.group_size)
        for name, linear in layers.items():
            quantize_linear(linear, rtn_scale(linear.weight.data, widths[name], self.group_size))
        notes = {
            "calibration_sha256": digest,
            "average_bits": round(average, 4),
            "widths": recipe,
            "divergence": {"mixed": mixed_divergence, f"uniform_{uniform}": uniform_divergence},
        }
        return StageResult(lm.with_model(lm.model), notes)

    def _scores(
        self, lm: LM, run: Run, batches: list[Any], digest: str, units: list[str]
    ) -> dict[str, dict[int, float]]:
        """Returns scores by unit and width, cached by weights, calibration, group size and seed."""
        import torch

        from winnow.method import calibration_statistics, sensitivity

        def score() -> dict[str, torch.Tensor]:
            scores = sensitivity.sensitivities(lm.model, batches, WIDTHS, self.group_size, run)
            return {unit: torch.tensor(list(scores[unit].values()), dtype=torch.float64) for unit in units}

        key_parts = (digest, self.group_size, run.seed, WIDTHS)
        statistics = calibration_statistics.cached_statistics(lm.model, run, "sensitivity", key_parts, score)
        return {unit: dict(zip(WIDTHS, statistics[unit].tolist(), strict=True)) for unit in units}


def _check_halves(texts: int) -> None:
    if texts < 2:
        raise UserError("method=[mixed] compares recipes on half of the calibration data: calibration.samples >= 2")


def allocate(scores: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], bits: float) -> dict[str, int]:
    """Returns the width of each unit that minimises the sum of scores, at no more than `bits` bits a weight on average.

    It is dynamic programming over the budget beyond the least width, in steps of the sizes' common divisor (the
    multiple-choice knapsack problem; Kellerer, Pferschy and Pisinger 2004, section 11.5). Where that gives more than `GRID`
    steps, costs are rounded up to coarser steps, which still never exceeds the budget.
    """
    import numpy as np

    least = WIDTHS[0]
    budget = math.floor(sum(sizes.values()) * (bits - least) + 1e-6)
    step = max(math.gcd(*sizes.values()), math.ceil(budget / GRID))
    room = budget // step
    best = np.zeros(room + 1)  # lowest sum of scores of the units so far, by the budget that they may use
    choices = {}
    for unit, size in sizes.items():
        options = np.full((len(WIDTHS), room + 1), np.inf)
        for row, width in enumerate(WIDTHS):
            cost = math.ceil((width - least) * size / step)
            if cost <= room:
                options[row, cost:] = best[: room + 1 - cost] + scores[unit][width]
        choices[unit] = options.argmin(0).astype(np.uint8)
        best = options.min(0)
    widths: dict[str, int] = {}
    for unit in reversed(list(sizes)):
        widths[unit] = WIDTHS[int(choices[unit][room])]
        room -= math.ceil((widths[unit] - least) * sizes[unit] / step)
    return {unit: widths[unit] for unit in sizes}
