"""Width pruning removes MLP channels, attention heads and hidden dimensions; the artifact is an ordinary, narrower model.

python compress.py method=[width] method.width.mlp=0.5
python compress.py method=[width,lora] method.width.hidden=0.75 method.width.heads=0.5
"""

from __future__ import annotations

import itertools
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

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)

WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Width(BaseStage):
    """Keeps the MLP channels, heads and hidden dimensions with the strongest activations, as many in every layer.

    Each layer chooses its own channels and heads; the hidden dimensions are the same for the whole model. `mlp` and `hidden`
    are rounded to the nearest multiple of `multiple`, which kernels and quantization groups want. Of the numbers of heads
    that keep the queries evenly spread over the key/value heads and that the architecture accepts (Llama and Gemma want a
    hidden size that it divides), the nearest is taken, and of ways to reach it the one with the fewest key/value heads. A
    share below 1 always drops something.

    What is kept is a slice of the base's weights, bit for bit, except that a narrower hidden size rescales the norms: RMSNorm
    divides by a mean square, which grows when mostly strong dimensions are left. On the embedded model (hidden=0.75, 128
    texts) that is worth little: perplexity 2.90 instead of 2.94, after 100 steps of recovery 1.940 instead of 1.947.

    Attributes:
        mlp: share of the MLP channels to keep; 1 leaves them alone, as for the other two.
        heads: share of the query heads to keep.
        hidden: share of the hidden size to keep.
        multiple: of the widths that are kept.

    Source: Minitron, arXiv:2407.14679, section 2.2: importance of channels, heads and embedding dimensions.
    Calibration: texts without labels; mean magnitude over a text's tokens, L2 norm over texts, of the inputs of `down_proj`
        (channels), the heads' outputs (their L2 norm), and the norms' outputs (hidden dimensions).
    Cost: N / L parameters of the L layers at a time on the device, the hidden states of the calibration tokens in main
        memory, and two forwards over them; the weights are sliced in place (from the code). Measured on the embedded model,
        64 texts, one core: 2 s.
    Writes: dense safetensors of the model's own architecture, narrower.
    Loaded by: transformers; vLLM; llama.cpp by method=[width,gguf]. With fewer heads or another hidden size, runtimes that
        take `head_dim` from the configuration; some work it out from the hidden size (versions of vLLM for Qwen2).
    """

    slot: ClassVar[Slot] = Slot.PRUNE
    matrices: ClassVar[tuple[str, ...] | None] = None
    perplexity_bound: ClassVar[float] = 1.1
    aggressive: ClassVar[Mapping[str, Any]] = {"mlp": 0.25, "heads": 0.25, "hidden": 0.25}

    mlp: float = knob(0.75, low=0.25, high=1.0)
    heads: float = knob(1.0, low=0.25, high=1.0)
    hidden: float = knob(1.0, low=0.25, high=1.0)
    multiple: int = knob(64, choices=(16, 32, 64, 128, 256), search=False)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        from winnow.model.spec import build_on_meta

        layers_of(build_on_meta(plan.config))  # raises UserError for other structures
        return plan.reshaped(self.narrow_config(plan.config))

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        # the slices, while the original weights are still in memory
        sliced = StageCost(host_bytes=sum(t.memory_bytes for t in plan.linears))
        return StageCost.calibrated(plan, calibration).then(sliced)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.data.calibration import calibration_batches
        from winnow.method.importance import cached_importances
        from winnow.model.reshape import rebuild_model

        old, new = lm.model.config, self.narrow_config(lm.model.config)
        layers = layers_of(lm.model)
        changes = [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in WIDTHS]
        logger.info(f"width: {', '.join(changes)}")
        batches, digest = calibration_batches(lm, run)
        units = cached_importances(lm.model, old.num_attention_heads, batches, digest, run)
        hidden = strongest(units.hidden, new.hidden_size)
        for layer, channels, heads in zip(layers, units.channels, units.heads, strict=True):
            queries, keys = strongest_heads(
                heads, old.num_key_value_heads, new.num_attention_heads, new.num_key_value_heads
            )
            narrow_block(layer, hidden, strongest(channels, new.intermediate_size), queries, keys, new.head_dim)
        if new.hidden_size < old.hidden_size:
            narrow_stream(lm.model, hidden, units.energy)
        notes = {"calibration_sha256": digest, **{name: getattr(new, name) for name in WIDTHS}}
        return StageResult(lm.with_model(rebuild_model(lm.model, new)), notes)

    def narrow_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Returns the configuration with the reduced widths.

        Raises:
            UserError: no widths near the requested ones are multiples, or accepted by the architecture.
        """
        from winnow.model.reshape import edit_config

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        channels = self._sizes(config.intermediate_size, "mlp")
        nearest = min(channels, key=lambda size: (abs(size / config.intermediate_size - self.mlp), size))
        widths = self._sizes(config.hidden_size, "hidden")
        head_counts = [(heads, kv_heads)]  # query heads, key/value heads
        if self.heads < 1:  # each key/value head keeps the same number of query heads
            per_kv = range(1, heads // kv_heads + 1)
            head_counts = [(kv * queries, kv) for kv in range(1, kv_heads + 1) for queries in per_kv][:-1]
        distance = {
            (h, q, kv): abs(h / config.hidden_size - self.hidden) + abs(q / heads - self.heads)
            for h, (q, kv) in itertools.product(widths, head_counts)
        }
        for h, q, kv in sorted(distance, key=lambda sizes: (distance[sizes], sizes)):
            try:
                return edit_config(
                    config,
                    intermediate_size=nearest,
                    hidden_size=h,
                    num_attention_heads=q,
                    num_key_value_heads=kv,
                    head_dim=head_dim(config),
                )
            except ValueError:  # Llama and Gemma need a hidden size that their heads divide
                continue
        raise UserError(
            f"method.width.heads={self.heads}, method.width.hidden={self.hidden}: {type(config).__name__} takes no hidden size "
            f"below {config.hidden_size} that is a multiple of {self.multiple} and of fewer than {heads} heads; "
            f"take a smaller method.width.multiple, or leave one of them at 1"
        )

    def _sizes(self, size: int, name: str) -> list[int]:
        """Returns the sizes to choose from: `size` itself, or the multiples below it."""
        share = getattr(self, name)
        if share == 1:
            return [size]
        sizes = list(range(self.multiple, size, self.multiple))
        if not sizes:
            raise UserError(
                f"method.width.{name}={share}: there is no multiple of {self.multiple} below {size}; "
                f"take a smaller method.width.multiple, or method.width.{name}=1"
            )
        return sizes


def head_dim(config: PretrainedConfig) -> int:
    """Returns the width of one head; a narrower model's config must state it, as its other sizes no longer imply it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layers_of(model: nn.Module) -> list[Any]:
    """Returns the decoder blocks, if each consists only of plain attention, a gated MLP, and norms.

    Raises:
        UserError: a block has other parts, whose width would not change with the rest.
    """
    from winnow.method.importance import norms_of
    from winnow.model.layers import decoder_blocks

    blocks = decoder_blocks(model)
    config: Any = model.config
    required = {f"self_attn.{name}" for name in ATTENTION} | {f"mlp.{name}" for name in MLP}
    for block in blocks:
        parts = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        norms = {name for name, _ in norms_of(block, config.hidden_size)}
        per_head = {f"self_attn.{name}" for name in ("q_norm", "k_norm")}
        other = parts - required - norms - per_head | (required - parts)
        other |= {
            name for name in per_head & parts if block.get_parameter(f"{name}.weight").numel() != head_dim(config)
        }
        if other:
            raise UserError(
                f"method=[width] narrows blocks of plain attention and a gated MLP; those of {type(model).__name__} differ in "
                f"{', '.join(sorted(other))}; take method=[depth]"
            )
    return list(blocks)


def strongest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of the `count` highest scores, ascending; among equal scores the first ones win."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def strongest_heads(
    score: torch.Tensor, kv_heads: int, new_heads: int, new_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the query heads and key/value heads to keep, with equally many query heads for each key/value head.

    It picks the strongest query heads within each group, then the groups whose picked heads have the largest sum.
    """
    groups = score.view(kv_heads, -1)  # [key/value heads, query heads for each]
    in_group = groups.argsort(dim=-1, descending=True, stable=True)[:, : new_heads // new_kv_heads].sort(-1).values
    keys = strongest(groups.gather(-1, in_group).sum(-1), new_kv_heads)
    return (keys[:, None] * groups.shape[1] + in_group[keys]).flatten(), keys


def narrow_block(
    block: Any, hidden: torch.Tensor, channels: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, head_dim: int
) -> None:
    """Slices the matrices of a block in place to the given dimensions, channels and heads."""
    import torch

    queries, keys = ((heads[:, None] * head_dim + torch.arange(head_dim)).flatten() for heads in (queries, keys))
    attention, mlp = block.self_attn, block.mlp
    for linear, rows, columns in (
        (attention.q_proj, queries, hidden),
        (attention.k_proj, keys, hidden),
        (attention.v_proj, keys, hidden),
        (attention.o_proj, hidden, queries),
        (mlp.gate_proj, channels, hidden),
        (mlp.up_proj, channels, hidden),
        (mlp.down_proj, hidden, channels),
    ):
        linear.weight.data = linear.weight.data[rows][:, columns]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[rows]


def narrow_stream(model: PreTrainedModel, hidden: torch.Tensor, energy: Mapping[nn.Module, torch.Tensor]) -> None:
    """Slices embeddings, head and norms in place to the given hidden dimensions.

    A norm over n of N dimensions divides by another mean square: N / n times the share of the energy in those n dimensions.
    The norm's gain compensates for it. Gemma scales its embeddings by the root of the hidden size: the embeddings compensate
    for that, and where the head shares their weights, the last norm compensates for the embeddings.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, new_size = embeddings.weight.shape[1], len(hidden)
    scale = math.sqrt(size / new_size) if hasattr(embeddings, "embed_scale") else 1.0
    tied = head.weight is embeddings.weight
    embeddings.weight.data = embeddings.weight.data[:, hidden] * scale
    if not tied:
        head.weight.data = head.weight.data[:, hidden]
    for norm, share in energy.items():
        gain = math.sqrt(share[hidden].sum().item() * size / new_size)
        if tied and norm is model.base_model.norm:
            gain /= scale
        norm.weight.data = scaled_norm_weight(norm, gain)[hidden]


def scaled_norm_weight(norm: Any, gain: float) -> torch.Tensor:
    """Returns the weight that multiplies the norm's output by `gain`; Gemma stores its weight minus one."""
    import torch

    weight: torch.Tensor = norm.weight.data
    ones = torch.ones_like(weight, dtype=torch.float32)
    offset = (norm(ones) - weight.float()).mean().round()  # on ones, a norm returns its full weight
    new: torch.Tensor = (weight.float() + offset) * gain - offset
    return new.to(weight.dtype)
