"""Width pruning: MLP channels, attention heads and hidden dimensions are left out; the artifact is an ordinary, narrower model.

python compress.py method=[width] method.width.mlp=0.5
python compress.py method=[width,lora] method.width.hidden=0.75 method.width.heads=0.5
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import Checked, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Width(Checked):
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
        from winnow.model.spec import on_meta

        layers_of(on_meta(plan.config))  # refuses other structures
        return plan.reshaped(self.narrower(plan.config))

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        sliced = StageCost(
            host_bytes=sum(t.memory_bytes for t in plan.linears)
        )  # beside the weights that they are slices of
        return StageCost.calibrated(plan, calibration).then(sliced)

    def __call__(self, lm: LM, run: Run) -> LM:
        from winnow.data.calibration import calibration_batches
        from winnow.method.importance import kept_importances
        from winnow.model.reshape import rebuilt

        old, new = lm.model.config, self.narrower(lm.model.config)
        layers = layers_of(lm.model)
        changes = [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in WIDTHS]
        run.log(f"width: {', '.join(changes)}")
        batches, digest = calibration_batches(lm, run)
        found = kept_importances(lm.model, old.num_attention_heads, batches, digest, run)
        hidden = strongest(found.hidden, new.hidden_size)
        for layer, channels, heads in zip(layers, found.channels, found.heads, strict=True):
            queries, keys = strongest_heads(
                heads, old.num_key_value_heads, new.num_attention_heads, new.num_key_value_heads
            )
            narrow_block(layer, hidden, strongest(channels, new.intermediate_size), queries, keys, new.head_dim)
        if new.hidden_size < old.hidden_size:
            narrow_stream(lm.model, hidden, found.energy)
        lm.manifest["_notes"] = {"calibration_sha256": digest, **{name: getattr(new, name) for name in WIDTHS}}
        return lm.changed(rebuilt(lm.model, new))

    def narrower(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration with the widths that are kept.

        Raises:
            UserError: no widths near those asked for are multiples, or are accepted by the architecture.
        """
        from winnow.model.reshape import edited

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        channels = self._sizes(config.intermediate_size, "mlp")
        nearest = min(channels, key=lambda size: (abs(size / config.intermediate_size - self.mlp), size))
        widths = self._sizes(config.hidden_size, "hidden")
        spreads = [(heads, kv_heads)]
        if self.heads < 1:  # each key/value head keeps the same number of query heads
            per_kv = range(1, heads // kv_heads + 1)
            spreads = [(kept * each, kept) for kept in range(1, kv_heads + 1) for each in per_kv][:-1]
        distance = {
            (h, q, kv): abs(h / config.hidden_size - self.hidden) + abs(q / heads - self.heads)
            for h, (q, kv) in itertools.product(widths, spreads)
        }
        for h, q, kv in sorted(distance, key=lambda sizes: (distance[sizes], sizes)):
            try:
                return edited(
                    config,
                    intermediate_size=nearest,
                    hidden_size=h,
                    num_attention_heads=q,
                    num_key_value_heads=kv,
                    head_dim=head_dim(config),
                )
            except ValueError:  # Llama and Gemma want a hidden size that their heads divide
                continue
        raise UserError(
            f"method.width.heads={self.heads}, method.width.hidden={self.hidden}: {type(config).__name__} takes no hidden size "
            f"below {config.hidden_size} that is a multiple of {self.multiple} and of fewer than {heads} heads; "
            f"take a smaller method.width.multiple, or leave one of them at 1"
        )

    def _sizes(self, size: int, name: str) -> list[int]:
        """The sizes that may be kept: all of it, or the multiples below it."""
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
    """Of one head, which narrower models must be told: it is no longer what the other sizes imply."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder blocks, if each is made of nothing but plain attention, a gated MLP, and norms.

    Raises:
        UserError: a block has other parts, whose width would not be changed with the rest.
    """
    from winnow.method.importance import norms_of
    from winnow.model.layers import decoder_blocks

    blocks = decoder_blocks(model)
    config: Any = model.config
    known = {f"self_attn.{name}" for name in ATTENTION} | {f"mlp.{name}" for name in MLP}
    for block in blocks:
        parts = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        norms = {name for name, _ in norms_of(block, config.hidden_size)}
        per_head = {f"self_attn.{name}" for name in ("q_norm", "k_norm")}
        other = parts - known - norms - per_head | (known - parts)
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
    """The indices of the `count` highest scores, ascending; of equal ones the first."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def strongest_heads(score: torch.Tensor, kv_heads: int, kept: int, kv_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query heads and key/value heads to keep, as many query heads with each key/value head.

    Within each group of query heads the strongest, then of the groups those whose kept heads are strongest together.
    """
    groups = score.view(kv_heads, -1)  # [key/value heads, query heads of each]
    in_group = groups.argsort(dim=-1, descending=True, stable=True)[:, : kept // kv_kept].sort(-1).values
    keys = strongest(groups.gather(-1, in_group).sum(-1), kv_kept)
    return (keys[:, None] * groups.shape[1] + in_group[keys]).flatten(), keys


def narrow_block(
    block: Any, hidden: torch.Tensor, channels: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, head_dim: int
) -> None:
    """Slices the matrices of a block in place to the dimensions, channels and heads that are kept."""
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
    """Slices what reads and writes the hidden states outside the matrices, in place: embeddings, head and norms.

    A norm over the n of N dimensions that are kept divides by another mean square: N / n times the share of the energy that
    they hold. The norm's gain makes up for it. Gemma scales its embeddings by the root of the hidden size: the embeddings
    make up for that, and where the head shares their weights, the last norm for them.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, kept = embeddings.weight.shape[1], len(hidden)
    scale = math.sqrt(size / kept) if hasattr(embeddings, "embed_scale") else 1.0
    tied = head.weight is embeddings.weight
    embeddings.weight.data = embeddings.weight.data[:, hidden] * scale
    if not tied:
        head.weight.data = head.weight.data[:, hidden]
    for norm, share in energy.items():
        gain = math.sqrt(share[hidden].sum().item() * size / kept)
        if tied and norm is model.base_model.norm:
            gain /= scale
        norm.weight.data = regained(norm, gain)[hidden]


def regained(norm: Any, gain: float) -> torch.Tensor:
    """The weight of a norm that puts out `gain` times as much; Gemma's stores its weight less one."""
    import torch

    weight: torch.Tensor = norm.weight.data
    ones = torch.ones_like(weight, dtype=torch.float32)
    missing = (norm(ones) - weight.float()).mean().round()  # what a norm makes of ones is its whole weight
    new: torch.Tensor = (weight.float() + missing) * gain - missing
    return new.to(weight.dtype)
