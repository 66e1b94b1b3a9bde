"""What a model is and what it needs, from its configuration alone: the model is built on the meta device, no weight is read.

Parameters are counted on the real modules, so that no table of architectures can be out of date. Bytes and cache sizes follow from
shapes and are exact for the formats named; memory to run and to train are estimates (`SOURCE`), good to some 20%.

    python -c "from winnow.model.spec import spec; print(spec('path/or/config'))"
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

SOURCE = "estimated"  # the label of memory_to_run and memory_to_train among measured figures
WIDTHS = (2, 3, 4, 8, 16, 32)
UNLIMITED = 2048  # the context that forecasts reckon with where a model sets none
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BITS = 16  # one scale a group; symmetric, so no zero point


@dataclass(frozen=True)
class ModelSpec:
    """Counts of a causal LM; sizes in bytes.

    Attributes:
        parameters: all of them, tied ones once.
        embedding_parameters: the token embedding and, where it is not tied to it, the output head.
        linear_parameters: matrices of the decoder's blocks, which weight quantization narrows.
        context: the longest sequence that the model takes; `UNLIMITED` where its attention sets none (ALiBi).
        dtype: of the cache, and of what is not quantized.
        group_size: of the quantized sizes.
        size_bytes: of the weights at each bit width; below 16 bits only the linear weights are narrowed, with a 16-bit
            scale a group, and the rest stays at 16 bits.
        cache_windows: for each layer that keeps keys and values, the positions that it keeps at most (0: all).
        kv_cache_bytes_per_token: over all those layers at `dtype`, before a window is full.
        lora_width: sum of inputs and outputs of the linear matrices: LoRA's parameters for each unit of rank.
    """

    name: str
    parameters: int
    embedding_parameters: int
    linear_parameters: int
    tied: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    dtype: str
    group_size: int
    size_bytes: Mapping[int, int]
    cache_windows: tuple[int, ...]
    kv_cache_bytes_per_token: int
    lora_width: int

    def kv_cache_bytes(self, context: int, batch: int = 1, bits: float | None = None) -> int:
        """Bytes of keys and values of `batch` sequences of `context` tokens; `bits` of a quantized cache, else `dtype`."""
        if not self.cache_windows:
            return 0
        a_layer = self.kv_cache_bytes_per_token / len(self.cache_windows)
        kept = sum(min(context, window) if window else context for window in self.cache_windows)
        share = bits / (8 * _DTYPE_BYTES[self.dtype]) if bits else 1
        return math.ceil(batch * kept * a_layer * share)

    def memory_to_run(self, bits: int = 16, context: int | None = None, batch: int = 1) -> int:
        """Weights, full cache, and the activations of one layer while the prompt is read, in bytes: an estimate.

        Assumes attention that does not materialise its matrix, and logits of the last position only, in float32.
        """
        context = context or self.context
        return self.size_bytes[bits] + self.kv_cache_bytes(context, batch) + self.activation_bytes(context, batch)

    def activation_bytes(self, context: int, batch: int = 1) -> int:
        """Of one layer while a prompt of `context` tokens is read, and the logits of its last position: an estimate."""
        widest = 4 * self.hidden_size + self.heads * self.head_dim + 3 * self.intermediate_size
        return batch * context * widest * _DTYPE_BYTES[self.dtype] + 4 * batch * self.vocab_size

    def memory_to_train(
        self,
        mode: Literal["full", "lora"] = "full",
        context: int | None = None,
        batch: int = 1,
        bits: int = 16,
        rank: int = 16,
        checkpointing: bool = True,
    ) -> int:
        """Weights, gradients, AdamW's states, activations and logits, in bytes: an estimate.

        A trained parameter takes 16 bytes: itself, its gradient and two moments in float32, or the same sum in mixed
        precision (Rajbhandari et al. 2020, "ZeRO", section 3.1). LoRA keeps the base at `bits` and trains `rank` times
        `lora_width`. With checkpointing a layer keeps its input alone, and one layer at a time all of what it computes
        (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5; without the attention matrix).
        """
        context = context or self.context
        if mode == "full":
            states = 16 * self.parameters
        else:
            states = self.size_bytes[bits] + 16 * rank * self.lora_width
        width = _DTYPE_BYTES[self.dtype]
        inputs = self.hidden_size * width
        # two norms with their inputs, query, attention's output and keys and values, gate, up, their activation and product
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        whole_layer = (4 * self.hidden_size + attention + 4 * self.intermediate_size) * width
        kept = self.layers * inputs + whole_layer if checkpointing else self.layers * whole_layer
        logits = self.vocab_size * (width + 4 + 4)  # as computed, in float32 for the loss, and their gradient
        return states + batch * context * (kept + logits)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dump`."""
        plain = dataclasses.asdict(self)
        plain["size_bytes"] = {str(bits): size for bits, size in self.size_bytes.items()}
        return plain

    def __str__(self) -> str:
        """A table for people."""
        windows = sorted({w for w in self.cache_windows if w})
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("  in linear layers", f"{self.linear_parameters:,}"),
            ("  in embeddings", f"{self.embedding_parameters:,}" + (" (tied)" if self.tied else "")),
            ("layers", f"{self.layers}"),
            ("hidden / intermediate", f"{self.hidden_size} / {self.intermediate_size}"),
            ("heads / key-value heads / width", f"{self.heads} / {self.kv_heads} / {self.head_dim}"),
            ("vocabulary", f"{self.vocab_size:,}"),
            ("context", f"{self.context:,} tokens"),
            *((f"weights at {bits} bits", gib(size)) for bits, size in self.size_bytes.items()),
            (
                f"cache a token ({self.dtype})",
                f"{self.kv_cache_bytes_per_token:,} B"
                + (f", windows of {', '.join(map(str, windows))}" if windows else ""),
            ),
            (f"cache of {self.context:,} tokens", gib(self.kv_cache_bytes(self.context))),
            ("to run at 16 bits, full context (estimated)", gib(self.memory_to_run())),
            ("to train, 2,048 tokens (estimated)", gib(self.memory_to_train(context=min(2048, self.context)))),
            ("to train LoRA (estimated)", gib(self.memory_to_train("lora", context=min(2048, self.context)))),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([self.name, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def gib(size: float) -> str:
    """A size for people, in GiB, or MiB where that is less than a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def spec(config: PretrainedConfig | str | Path, group_size: int = 128, dtype: str | None = None) -> ModelSpec:
    """The counts of the model that a configuration describes.

    Args:
        config: of transformers, or the folder or hub id of one. Of a multimodal model all parameters count, and the
            text decoder is what is described.
        group_size: weights that share a scale, in the sizes below 16 bits.
        dtype: of the cache and of what is not quantized; by default that of the configuration, else bfloat16.

    Raises:
        ValueError: transformers knows no causal LM for the configuration.
        UserError: it is not a stack of decoder blocks with attention.
    """
    from transformers import AutoConfig

    from winnow.model.own_architectures import register

    register()
    whole = AutoConfig.from_pretrained(config) if isinstance(config, str | Path) else config
    model = on_meta(whole)
    text = whole.get_text_config(decoder=True)
    dtype = dtype or str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(_DTYPE_BYTES)}")

    shapes = _block_matrices(model, text.num_hidden_layers)
    linear = sum(math.prod(shape) for shape in shapes)
    groups = sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / group_size) for shape in shapes)
    embeddings = {id(w): w.numel() for w in _embeddings(model)}
    total = sum(p.numel() for p in model.parameters())
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise UserError(
            f"{type(model).__name__}: its configuration has no num_attention_heads; models without attention, "
            f"such as pure state-space models, are not supported: give one with attention in its decoder blocks"
        )
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    key, value = _cached_widths(text, kv_heads, head_dim)
    windows = _cache_windows(text)
    return ModelSpec(
        name=type(model).__name__,
        parameters=total,
        embedding_parameters=sum(embeddings.values()),
        linear_parameters=linear,
        tied=len(embeddings) == 1,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        context=context_of(text) or UNLIMITED,
        dtype=dtype,
        group_size=group_size,
        size_bytes={bits: _size(total, linear, groups, bits) for bits in WIDTHS},
        cache_windows=windows,
        kv_cache_bytes_per_token=len(windows) * (key + value) * _DTYPE_BYTES[dtype],
        lora_width=sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes),
    )


def context_of(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model takes, or None where its attention sets none."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")  # as most call it; MPT
    return next((value for name in names if (value := getattr(text, name, None))), None)


def on_meta(config: PretrainedConfig) -> nn.Module:
    """The model that a configuration describes, without weights; not quantized whatever the configuration says."""
    import torch
    from transformers import AutoModelForCausalLM

    from winnow.model.quiet import quiet

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # counts are of the model, not of one way to store it
    # code that came with the configuration runs already
    trusted = type(config).__module__.startswith("transformers_modules.")
    with quiet(), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)  # type: ignore[no-untyped-call]
    return model


def _block_matrices(model: nn.Module, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the matrices [..., out, in] in the decoder's blocks: linear weights, and experts stacked in three axes."""
    from torch import nn

    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers}
    # the vision tower of a multimodal model may have as many layers
    senses = ("vision", "visual", "audio")
    blocks = next((m for n, m in stacks.items() if not any(sense in n for sense in senses)), None)
    if blocks is None:
        raise UserError(f"{type(model).__name__} has no list of {layers} decoder blocks")
    holders = [m for m in blocks.modules() if not isinstance(m, nn.Conv1d)]
    return [tuple(p.shape) for m in holders for p in m.parameters(recurse=False) if p.ndim >= 2]


def _embeddings(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight for layer in layers if layer is not None]


def _size(total: int, linear: int, groups: int, bits: int) -> int:
    if bits >= 16:
        return total * bits // 8
    return 2 * (total - linear) + math.ceil((linear * bits + groups * _SCALE_BITS) / 8)


def _cached_widths(text: Any, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Elements of keys and of values that a layer caches for one token, over all its heads.

    Latent attention (DeepSeek) is cached unfolded by transformers, with keys wider than values.
    """
    if getattr(text, "kv_lora_rank", None):
        return text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim), (
            text.num_attention_heads * text.v_head_dim
        )
    return kv_heads * head_dim, kv_heads * head_dim


def _cache_windows(text: Any) -> tuple[int, ...]:
    """For each layer with a cache that grows, its window, or 0 for none.

    Layers of linear attention or state spaces keep a state of fixed size, and layers that share another's cache none.
    """
    window = getattr(text, "sliding_window", None) or 0
    if getattr(text, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    spans = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    spans["chunked_attention"] = getattr(text, "attention_chunk_size", None) or 0
    return tuple(spans[kind] for kind in kinds if kind in spans)
