"""Prunes single weights by magnitude, or by magnitude times activation (Wanda; Sun et al. 2023, arXiv:2306.11695).

The pattern is unstructured at any sparsity, or N:M (N zeros of every M consecutive inputs), which sparse kernels can use. The
saved weights are dense tensors with zeros: smaller only together with a method or a server that uses the zeros. All layers may
have the same sparsity, or each its own (`winnow.method.allocation`).

    python compress.py method=[wanda] method.wanda.sparsity=0.5
    python compress.py method=[wanda] method.wanda.pattern=2:4
    python compress.py method=[wanda] method.wanda.sparsity=0.7 method.wanda.allocation=owl
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)

PATTERNS = ("unstructured", "2:4", "4:8")
ALLOCATIONS = ("uniform", "global", "owl")


@dataclass(frozen=True)
class Pruning(BaseStage):
    """Base of the methods that prune single weights: their sparsity, its pattern, and its allocation to layers."""

    slot: ClassVar[Slot] = Slot.PRUNE
    aggressive: ClassVar[Mapping[str, Any]] = {"sparsity": 0.7, "allocation": "owl"}

    sparsity: float = knob(0.5, low=0.0, high=0.95, when={"pattern": "unstructured"}, search_range=(0.1, 0.7))
    pattern: str = knob("unstructured", choices=PATTERNS)
    allocation: str = knob("uniform", choices=ALLOCATIONS, when={"pattern": "unstructured"})
    owl_m: float = knob(5.0, low=1.0, high=20.0, search=False)  # an outlier is this many times the mean
    owl_lambda: float = knob(0.08, low=0.0, high=0.5, search=False)  # blocks differ from the target by at most this

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def __post_init__(self) -> None:
        super().__post_init__()
        option = self.option
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise UserError(
                f"{option}.sparsity={self.sparsity} clashes with {option}.pattern={self.pattern}, which zeroes "
                f"half of the weights; leave sparsity at 0.5 or take pattern=unstructured"
            )
        if self.pattern != "unstructured" and self.allocation != "uniform":
            raise UserError(
                f"{option}.allocation={self.allocation} clashes with {option}.pattern={self.pattern}, which zeroes "
                f"half of every layer; leave allocation at uniform or take pattern=unstructured"
            )

    def predict(self, plan: ModelLayout) -> ModelLayout:
        """Returns a layout of the same sizes: zeros are stored like other weights."""
        if self.pattern != "unstructured":
            group = int(self.pattern.split(":")[1])
            for name, t in plan.tensors.items():
                if t.linear and t.shape[1] % group:
                    raise UserError(
                        f"method.{self.name}.pattern={self.pattern} needs widths that are multiples of {group}, and "
                        f"{name.removesuffix('.weight')} has {t.shape[1]} inputs; take pattern=unstructured"
                    )
        return dataclasses.replace(plan, sparse=True)

    def mask(self, score_oi: torch.Tensor, sparsity: float, by_row: bool) -> torch.Tensor:
        """Returns the mask of the weights to zero: those with the smallest scores in each group, each row, or the matrix."""
        from winnow.method.masks import smallest, smallest_of_all, smallest_of_pattern

        if self.pattern != "unstructured":
            return smallest_of_pattern(score_oi, self.pattern)
        return smallest(score_oi, sparsity) if by_row else smallest_of_all(score_oi, sparsity)

    def sparsities(
        self, lm: LM, run: Run, batches: Sequence[torch.Tensor] | None, digest: str | None
    ) -> dict[str, float]:
        """Returns the sparsity of each linear layer by name.

        Scores use the inputs on `batches`, whose hash is `digest`; without batches they are magnitudes.
        """
        from winnow.method import allocation, calibration_statistics
        from winnow.model.layers import decoder_blocks, linears

        names = {linear: name for name, linear in linears(lm.model).items()}
        if self.allocation == "uniform" or self.pattern != "unstructured":
            return dict.fromkeys(names.values(), self.sparsity)
        if self.allocation == "global":

            def count() -> dict[str, torch.Tensor]:
                return {
                    names[linear]: allocation.histogram(
                        score if batches is None else score / score.mean().clamp_min(1e-30)
                    )
                    for block in self._scores(lm, run, batches)
                    for linear, score in block.items()
                }

            # without calibration data, counting is as fast as the cache
            counts = (
                count()
                if digest is None
                else calibration_statistics.cached_statistics(lm.model, run, "scores", (digest,), count)
            )
            ordered = {name: counts[name] for name in names.values() if name in counts}  # the cache has another order
            return allocation.global_threshold(ordered, self.sparsity)
        outliers = calibration_statistics.cached_statistics(
            lm.model, run, "outliers", (digest, self.owl_m), lambda: self._outliers(lm, run, batches)
        )
        blocks = [[m for m in block.modules() if m in names] for block in decoder_blocks(lm.model)]
        sizes = [sum(linear.weight.numel() for linear in block) for block in blocks]
        shares = allocation.owl(outliers["blocks"].tolist(), sizes, self.sparsity, self.owl_lambda)
        return {names[linear]: share for block, share in zip(blocks, shares, strict=True) for linear in block}

    def _outliers(self, lm: LM, run: Run, batches: Sequence[torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Returns the share of outliers in each block [blocks]."""
        import torch

        from winnow.method import allocation

        scores = self._scores(lm, run, batches)
        shares = [allocation.outlier_share(list(block.values()), self.owl_m) for block in scores]
        return {"blocks": torch.tensor(shares, dtype=torch.float64)}

    def _scores(
        self, lm: LM, run: Run, batches: Sequence[torch.Tensor] | None
    ) -> Iterator[dict[nn.Linear, torch.Tensor]]:
        """Yields for each block of the unpruned model |weight|, times the norms of its inputs if there are batches."""
        from winnow.method.blocks import iterate_blocks
        from winnow.model.layers import decoder_blocks, linears_in

        blocks = decoder_blocks(lm.model)
        if batches is None:
            for block in blocks:
                layers = linears_in(block).values()
                yield {linear: linear.weight.data.to(run.device).abs() for linear in layers}
            return
        for index, block, run_calibration in iterate_blocks(lm.model, batches, run):
            groups = input_norms(block, run_calibration)
            yield {m: m.weight.data.abs().float() * norm_i for members, norm_i in groups for m in members}
            logger.info(f"{self.name}: allocation, block {index + 1} of {len(blocks)}")


@dataclass(frozen=True)
class Magnitude(Pruning):
    """Zeroes the smallest weights of each matrix (unstructured), of all together (allocation=global) or of each group (N:M).

    Source: Han et al. 2015, arXiv:1506.02626, section 3. allocation=owl: Yin et al. 2023, arXiv:2310.05175, section 3.2.
    Calibration: none; with allocation=owl any text, passed once through the unpruned model for the norms of the inputs.
    Cost: time proportional to N. On the device one matrix and about twice its size in single precision for the ranking;
        allocation=global looks at all weights once more, allocation=owl costs what one pass of wanda does (derived from the
        code).
    Writes: dense safetensors in the model's own type; zeros take as much room as other weights.
    Loaded by: transformers; vLLM and all that read the base model.
    """

    perplexity_bound: ClassVar[float] = 1.02  # measured: 1.005

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        ranked = StageCost.selected(plan) if self.pattern == "unstructured" else StageCost.sorted(plan)
        return StageCost.calibrated(plan, calibration).then(ranked) if self.allocation == "owl" else ranked

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.data.calibration import calibration_batches
        from winnow.model.layers import decoder_blocks, linears, linears_in

        names = {linear: name for name, linear in linears(lm.model).items()}
        batches, digest = calibration_batches(lm, run) if self.allocation == "owl" else (None, None)
        sparsities = self.sparsities(lm, run, batches, digest)
        blocks = decoder_blocks(lm.model)
        for index, block in enumerate(blocks):
            for linear in linears_in(block).values():
                score = linear.weight.data.to(run.device).abs()
                mask = self.mask(score, sparsities[names[linear]], by_row=False)  # one threshold a matrix
                linear.weight.data.masked_fill_(mask.to(linear.weight.device), 0)
            logger.info(f"{self.name}: block {index + 1} of {len(blocks)}")
        return StageResult(lm.with_model(lm.model), notes(blocks, digest))


@dataclass(frozen=True)
class CalibratedPruning(Pruning):
    """Base of the methods that prune block by block: each linear layer by its inputs, which come from pruned blocks."""

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        iterations = 1 if self.allocation == "uniform" else 2
        return StageCost.calibrated(plan, calibration, passes=2 * iterations) + StageCost.sorted(plan)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.data.calibration import calibration_batches
        from winnow.method.blocks import iterate_blocks
        from winnow.method.checkpoint import checkpoint_of
        from winnow.model.layers import decoder_blocks, linears

        names = {linear: name for name, linear in linears(lm.model).items()}
        batches, digest = calibration_batches(lm, run)
        checkpoint = checkpoint_of(self, lm, run, digest)
        if "sparsities" not in checkpoint.state:
            checkpoint.state["sparsities"] = self.sparsities(lm, run, batches, digest)
        sparsities = checkpoint.state["sparsities"]
        blocks = decoder_blocks(lm.model)
        for index, block, run_calibration in iterate_blocks(lm.model, batches, run, checkpoint):
            layers = {linear: (name, sparsities[name]) for linear, name in names.items()}
            self.prune_block(block, run_calibration, layers)
            logger.info(f"{self.name}: block {index + 1} of {len(blocks)}")
        return StageResult(lm.with_model(lm.model), notes(blocks, digest))

    def prune_block(
        self, block: nn.Module, run_calibration: Callable[[], None], layers: Mapping[nn.Linear, tuple[str, float]]
    ) -> None:
        """Prunes the linear layers of a block on the device in place; `layers` has the name and sparsity of each layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Wanda(CalibratedPruning):
    """Zeroes, in each output row, the weights with the smallest |weight| x norm of its input (eq. 1), block by block.

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1 and section 3. allocation=owl: Yin et al. 2023, arXiv:2310.05175,
        section 3.2; allocation=global: one threshold over the scores of all matrices, each divided by its mean.
    Calibration: any text, passed twice through each block, once to see its inputs and once to hand on what the pruned block
        puts out; with allocation=owl or global once more through the unpruned model.
    Cost: time of 4 N T operations for T tokens (6 N T with owl or global), and the sorting of N scores. On the device one
        block and, of its widest matrix, 13 bytes a weight for scores and ranks (4 bytes a weight of the whole block while
        allocating); in main memory the model and 2 T x hidden bytes (derived from the code). Goes on after an interruption.
    Writes: dense safetensors in the model's own type; zeros take as much room as other weights.
    Loaded by: transformers; vLLM and all that read the base model.
    """

    perplexity_bound: ClassVar[float] = 1.02  # measured: 1.004

    def prune_block(
        self, block: nn.Module, run_calibration: Callable[[], None], layers: Mapping[nn.Linear, tuple[str, float]]
    ) -> None:
        for members, norm_i in input_norms(block, run_calibration):
            for linear in members:
                score = linear.weight.data.abs().float() * norm_i
                mask = self.mask(score, layers[linear][1], by_row=True)  # compared within each output, section 3
                linear.weight.data.masked_fill_(mask, 0)


def input_norms(block: nn.Module, run_calibration: Callable[[], None]) -> list[tuple[list[nn.Linear], torch.Tensor]]:
    """Returns the L2 norms [in] of the inputs of a block's linear layers over all tokens; ones for layers without tokens.

    Layers that read the same tensor share one entry.
    """
    import torch

    from winnow.method.blocks import input_sums

    def start(linear: nn.Linear) -> torch.Tensor:
        return torch.zeros(linear.in_features, device=linear.weight.device)

    def add(sum_i: torch.Tensor, x_ti: torch.Tensor) -> None:
        sum_i += x_ti.square().sum(0)

    sums = input_sums(block, run_calibration, start, add)
    return [(members, sum_i.sqrt() if sum_i.any() else torch.ones_like(sum_i)) for members, sum_i in sums]


def notes(blocks: nn.ModuleList, calibration_sha256: str | None) -> dict[str, Any]:
    """Returns the manifest notes: the calibration hash, and the share of zeros in the linear layers of each block."""
    from winnow.model.layers import linears_in

    shares = []
    for block in blocks:
        weights = [m.weight for m in linears_in(block).values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        shares.append(round(zeros / sum(weight.numel() for weight in weights), 4))
    calibration = {"calibration_sha256": calibration_sha256} if calibration_sha256 else {}
    return {**calibration, "block_sparsities": shares}
