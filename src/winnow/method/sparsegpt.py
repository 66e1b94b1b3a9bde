"""SparseGPT prunes weights and compensates with the remaining weights (Frantar and Alistarh 2023, arXiv:2301.00774).

python compress.py method=[sparsegpt] method.sparsegpt.sparsity=0.6
python compress.py method=[sparsegpt] method.sparsegpt.pattern=2:4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.method.knobs import knob
from winnow.method.prune import CalibratedPruning

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

ATTEMPTS = 4  # each multiplies the damping by ten


@dataclass(frozen=True)
class SparseGPT(CalibratedPruning):
    """Zeroes the weights that change a layer's outputs least, and updates the later ones of their row to compensate.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774, section 3 and algorithm 1. allocation=owl: Yin et al. 2023,
        arXiv:2310.05175, section 3.2; allocation=global: one threshold over |weight| x norm of its input, which takes the
        Hessian for diagonal, each matrix divided by its mean.
    Calibration: any text, passed twice through each block, once for the Hessians of its inputs and once to hand on what the
        pruned block puts out; with allocation=owl or global once more through the unpruned model. Best with several times
        as many tokens as the widest layer has inputs.
    Cost: time of 4 N T operations for T tokens (6 N T with owl or global), T i^2 for each Hessian, about i^3 for its inverse
        and o i^2 for each matrix [o, i]. On the device one block, 4 i^2 bytes for each of its different inputs (4 in Llama)
        and 16 i^2 more for the widest while it is inverted, 12 bytes a weight of one matrix; in main memory the model and 2 T
        x hidden bytes (derived from the code). Goes on after an interruption.
    Writes: dense safetensors in the model's own type; zeros take as much room as other weights.
    Loaded by: transformers; vLLM and all that read the base model.
    """

    perplexity_bound: ClassVar[float] = 1.01  # measured: 1.001

    block_size: int = knob(128, choices=(32, 64, 128, 256), search=False)  # columns that a mask is chosen for at once
    damping: float = knob(0.01, low=0.0001, high=1.0, log=True, search=False)  # of the mean of the Hessian's diagonal

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        passes = 2 if self.allocation == "uniform" else 3
        reading = StageCost.calibrated(plan, calibration, passes) + StageCost.hessians(plan, calibration)
        return reading + StageCost.solved(plan)

    def prune_block(
        self, block: nn.Module, run_calibration: Callable[[], None], layers: Mapping[nn.Linear, tuple[str, float]]
    ) -> None:
        from winnow.method.blocks import input_sums

        groups = input_sums(block, run_calibration, _zero_hessian, _add_to_hessian)
        while groups:  # frees each Hessian when its layers are done
            members, hessian_ii = groups.pop()
            dead_i = hessian_ii.diagonal() == 0
            factor_ii = inverse_factor(hessian_ii, self.damping, layers[members[0]][0])
            for linear in members:
                weight, sparsity = linear.weight.data, layers[linear][1]
                pruned = prune_columns(weight.float(), factor_ii, dead_i, sparsity, self.pattern, self.block_size)
                weight.copy_(pruned)


def _zero_hessian(linear: nn.Linear) -> torch.Tensor:
    import torch

    return torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)


def _add_to_hessian(hessian_ii: torch.Tensor, x_ti: torch.Tensor) -> None:
    """Adds x x^T to the Hessian H = X X^T (section 3.1), whose scale cancels out of masks and updates."""
    hessian_ii.addmm_(x_ti.T, x_ti)


def inverse_factor(hessian_ii: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Returns the upper triangular U with U^T U = the inverse of the damped Hessian (section 3.3, as in GPTQ).

    Row j of U is, up to the factor U_jj, the row j of the inverse for the columns from j on. Inputs that are always zero are
    treated as independent of all others. If a Hessian cannot be inverted, the damping is raised.

    Raises:
        UserError: the Hessian cannot be inverted at the largest damping; the message names the layer.
    """
    import torch

    diagonal = hessian_ii.diagonal()
    mean = diagonal[diagonal > 0].mean() if (diagonal > 0).any() else torch.ones_like(diagonal[0])
    for attempt in range(ATTEMPTS):
        damped = hessian_ii.clone()
        damped.diagonal().add_(damping * 10**attempt * mean).add_(torch.where(diagonal == 0, mean, 0))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and factor.isfinite().all():
            upper: torch.Tensor = factor
            return upper
    raise UserError(
        f"method.sparsegpt: the Hessian of the inputs of {name} cannot be inverted, even with damping={damping * 10**attempt:g}; "
        f"give more data (calibration.samples), or take method=[wanda]"
    )


def prune_columns(
    weight_oi: torch.Tensor,
    factor_ii: torch.Tensor,
    dead_i: torch.Tensor,
    sparsity: float,
    pattern: str,
    block_size: int,
) -> torch.Tensor:
    """Returns the pruned weights [out, in] of algorithm 1, each exactly 0 or updated for the zeros before it in its row.

    A mask is chosen for `block_size` columns at once over all rows, or for one group of a pattern, by the error (eq. 3)
    of removing a weight after the updates so far. Inputs that are always zero (`dead_i`) are pruned first.
    """
    import torch

    from winnow.method.masks import group_of, smallest_count, smallest_of_pattern

    weight_oi = weight_oi.clone()
    rows, width = weight_oi.shape
    error_i = factor_ii.diagonal().square()  # [H^-1]_jj when only the columns from j on are left
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block, factor = weight_oi[:, start:end], factor_ii[start:end, start:end]  # views, changed in place
        score = (block.square() / error_i[start:end]).masked_fill(dead_i[start:end], 0)
        if pattern == "unstructured":  # counts are rounded so that they add up to the share of the matrix
            count = round(rows * end * sparsity) - round(rows * start * sparsity)
            mask = smallest_count(score, count)
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        errors = torch.zeros_like(block)
        for j in range(end - start):
            if pattern != "unstructured" and j % (group := group_of(pattern)[1]) == 0:
                part = slice(j, j + group)
                score = block[:, part].square() / error_i[start:end][part]
                mask[:, part] = smallest_of_pattern(score.masked_fill(dead_i[start:end][part], 0), pattern)
            errors[:, j] = torch.where(mask[:, j], block[:, j], 0) / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
        block.masked_fill_(mask, 0)
        weight_oi[:, end:] -= errors @ factor_ii[start:end, end:]
    return weight_oi
