"""Factorises the linear layers into low-rank products, W ~ B A, chosen by their calibration inputs.

python compress.py method=[lowrank] method.lowrank.share=0.6
python compress.py method=[lowrank,lora,gptq]
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank(BaseStage):
    """Replaces each linear layer of the blocks by two narrower ones whose product comes nearest to its outputs.

    Of all matrices of rank r, B A = U U^T W loses least of W X, where U holds the r leading eigenvectors of the outputs'
    second moments W X X^T W^T: the truncation that SVD-LLM reaches by whitening with a Cholesky factor of X X^T, without the
    factor's inverse. To X X^T goes the identity times its median diagonal entry, so that directions which the texts hardly
    show are not given up (embedded model, 64 texts: perplexity 3.46 instead of 4.63; 128 longer ones: 3.23 instead of 4.27).
    Blocks are worked through in order, on the outputs of those factorised before.

    r (in + out) weights are kept of in * out: r is the largest multiple of `multiple` that keeps no more than `share` of them,
    at least one, so that groups of a later quantization divide it. A layer narrower than 4 * `multiple` takes multiples of a
    quarter of its width, as a power of two, instead: one multiple never keeps more than half.

    Attributes:
        share: of a layer's weights to keep, at most.
        multiple: of the ranks.

    Source: SVD-LLM, arXiv:2403.07378, section 3.1 (truncation-aware whitening), by eigenvectors of the outputs' moments.
    Calibration: texts without labels; the second moments of each layer's inputs over all tokens.
    Cost: N / L parameters of the L layers at a time on the device, the hidden states of the calibration tokens in main
        memory, and two forwards over them; a matrix of in^2 numbers for each kind of input of a layer, and for each of its
        matrices the eigenvectors of one of min(in, out)^2 in double precision (from the code). Measured on the embedded
        model, 64 texts, one core: 4 s.
    Writes: dense safetensors, with an architecture of its own (`lowrank_llama` ...) whose code lies beside them.
    Loaded by: transformers, with trust_remote_code=True where winnow does not load it; neither vLLM nor llama.cpp.
    """

    slot: ClassVar[Slot] = Slot.PRUNE
    perplexity_bound: ClassVar[float] = 2.5
    aggressive: ClassVar[Mapping[str, Any]] = {"share": 0.3, "multiple": 16}

    share: float = knob(0.75, low=0.05, high=0.95, search_range=(0.3, 0.9))
    multiple: int = knob(64, choices=(16, 32, 64, 128), search=False)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        from winnow.model.own_architectures import code_bytes, factorised_architecture

        config, _ = factorised_architecture(plan.config, self.ranks(plan.config))
        added = len(config.to_json_string()) - len(plan.config.to_json_string())
        return dataclasses.replace(plan.reshaped(config), other_bytes=plan.other_bytes + code_bytes() + added)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, count_tokens

        ranks = self.ranks(plan.config)
        weights = {name: plan.tensors[f"{name}.weight"] for name in ranks}
        factors = {(*weights[name].shape, rank) for name, rank in ranks.items()}
        # products with the moments, and the eigenvectors of each layer's outputs (about 10 n^3) in double precision
        solving = StageCost(
            flops=sum(2 * t.numel * sum(t.shape) + 10 * min(t.shape) ** 3 for t in plan.linears),
            device_bytes=max((24 * min(t.shape) ** 2 + 12 * t.numel for t in plan.linears), default=0),
            # the factors, while the original weights are still in memory
            host_bytes=self.share * sum(t.memory_bytes for t in plan.linears),
            # of both factors, in the forward of a changed block
            matmuls=2 * len(factors) * count_tokens(calibration).shapes,
        )
        return StageCost.calibrated(plan, calibration) + StageCost.hessians(plan, calibration) + solving

    def __call__(self, lm: LM, run: Run) -> StageResult:
        import torch

        from winnow.data.calibration import calibration_batches
        from winnow.method.blocks import input_sums, iterate_blocks
        from winnow.model.layers import decoder_blocks, linears
        from winnow.model.modeling_lowrank import product_in_place_of
        from winnow.model.own_architectures import factorised_architecture
        from winnow.model.reshape import rebuild_model

        ranks = self.ranks(lm.model.config)
        config, kind = factorised_architecture(lm.model.config, ranks)
        names = {linear: name for name, linear in linears(lm.model).items()}
        batches, digest = calibration_batches(lm, run)
        count = len(decoder_blocks(lm.model))
        for index, block, run_calibration in iterate_blocks(lm.model, batches, run):
            moments = input_sums(
                block,
                run_calibration,
                start=lambda linear: linear.weight.new_zeros(2 * [linear.in_features], dtype=torch.float32),
                add=_add_moment,
            )
            for members, moment_ii in moments:
                moment_ii = regularized(moment_ii)
                for linear in members:
                    name = names[linear]
                    product = product_in_place_of(linear, ranks[name])
                    up, down = best_product(linear.weight.data, moment_ii, ranks[name])
                    product.get_parameter("0.weight").data.copy_(down)
                    product.get_parameter("1.weight").data.copy_(up)
                    if linear.bias is not None:
                        product.get_parameter("1.bias").data.copy_(linear.bias)
                    lm.model.set_submodule(name, product)
            logger.info(f"lowrank: block {index + 1} of {count}")
        return StageResult(lm.with_model(rebuild_model(lm.model, config, kind)), {"calibration_sha256": digest})

    def ranks(self, config: PretrainedConfig) -> dict[str, int]:
        """Returns the rank of each linear layer of the blocks, by name.

        Raises:
            UserError: the architecture has no factorised form.
        """
        from winnow.model.layers import linears
        from winnow.model.own_architectures import FAMILIES
        from winnow.model.spec import build_on_meta

        if config.model_type not in FAMILIES:
            raise UserError(
                f"method=[lowrank] factorises {', '.join(FAMILIES)}; not {config.model_type}: take method=[depth] or [width]"
            )
        matrices = linears(build_on_meta(config))
        return {name: self._rank(linear.in_features, linear.out_features) for name, linear in matrices.items()}

    def _rank(self, inputs: int, outputs: int) -> int:
        quarter = min(inputs, outputs) // 4
        multiple = min(self.multiple, 2 ** max(quarter.bit_length() - 1, 0))
        largest = self.share * inputs * outputs / (inputs + outputs)
        return int(max(1, largest // multiple) * multiple)


def _add_moment(total_ii: torch.Tensor, x_ti: torch.Tensor) -> None:
    total_ii.addmm_(x_ti.T, x_ti)


def regularized(moment_ii: torch.Tensor) -> torch.Tensor:
    """Adds the median diagonal entry to the diagonal of the moments [in, in], which stands for unseen texts."""
    import torch

    moment = moment_ii.double()
    return moment + moment.diagonal().median() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def best_product(weight_oi: torch.Tensor, moment_ii: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns B [out, rank] and A [rank, in] whose product P minimises the mean of |W x - P x|^2.

    Args:
        weight_oi: W [out, in].
        moment_ii: sum of x x^T over the inputs [in, in].

    W x is projected on the leading eigenvectors of its second moments, for a tall matrix within its column space (Q R). Both
    factors get the root of each direction's strength, as SVD-LLM splits its singular values, so that quantizing either factor
    loses less (on the embedded model, 4 bits cost 4 % of perplexity instead of 11 % unsplit).
    """
    import torch

    weight, moment = weight_oi.double(), moment_ii.double()
    basis = None
    if weight.shape[0] > weight.shape[1]:
        basis, weight = torch.linalg.qr(weight)
    values, vectors = torch.linalg.eigh(weight @ moment @ weight.T)  # ascending
    strength, leading = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    # the clamp keeps weights small in directions that are rare in the calibration data
    root = (strength / strength.mean().clamp_min(1e-30)).clamp_min(1e-6) ** 0.25
    up = leading if basis is None else basis @ leading
    return up * root, (leading.T @ weight) / root[:, None]
