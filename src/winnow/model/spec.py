"""Counts a model's parameters and memory from its configuration alone, on the meta device and without reading weights.

Parameters are counted on the real modules, so that there is no table of architectures to keep up to date. Weight and cache sizes
follow from shapes and are exact for the formats named; memory to run and to train are estimates (`SOURCE`), accurate to some 20%.

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

SOURCE = "estimated"  # source of memory_to_run and memory_to_train, next to measured figures
WIDTHS = (2, 3, 4, 8, 16, 32)
UNLIMITED = 2048  # context length assumed in forecasts for a model without a limit
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BITS = 16  # one scale per group; symmetric, so no zero point


@dataclass(frozen=True)
class ModelSpec:
    """Parameter counts and shapes of a causal LM, with sizes in bytes.

    Attributes:
        parameters: number of all parameters; tied ones count once.
        embedding_parameters: those of the token embedding and of an output head that is not tied to it.
        linear_parameters: those of the matrices in the decoder blocks, which weight quantization works on.
        context: the longest sequence that the model takes; `UNLIMITED` if its attention sets no limit (ALiBi).
        dtype: the type of the KV cache and of unquantized weights.
        group_size: weights that share a scale, in the quantized sizes.
        size_bytes: size of the weights at each bit width; below 16 bits only the linear weights are quantized, with a 16-bit
            scale per group, and the rest stays at 16 bits.
        cache_windows: for each layer with a KV cache, the maximum number of cached positions (0: all).
        kv_cache_bytes_per_token: bytes over all those layers at `dtype`, before a window is full.
        lora_width: sum of inputs and outputs of the linear matrices: LoRA's parameters per unit of rank.
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
        """Returns the bytes of the KV cache of `batch` sequences of `context` tokens, quantized to `bits` or else in `dtype`."""
        if not self.cache_windows:
            return 0
        layer_bytes = self.kv_cache_bytes_per_token / len(self.cache_windows)
        cached_positions = sum(min(context, window) if window else context for window in self.cache_windows)
        share = bits / (8 * _DTYPE_BYTES[self.dtype]) if bits else 1
        return math.ceil(batch * cached_positions * layer_bytes * share)

    def memory_to_run(self, bits: int = 16, context: int | None = None, batch: int = 1) -> int:
        """Estimates the bytes of weights, a full KV cache, and the activations of one layer during prefill.

        The estimate assumes attention without a materialised matrix, and float32 logits of the last position only.
        """
        context = context or self.context
        return self.size_bytes[bits] + self.kv_cache_bytes(context, batch) + self.activation_bytes(context, batch)

    def activation_bytes(self, context: int, batch: int = 1) -> int:
        """Estimates the bytes of one layer's activations during prefill of `context` tokens, and of the last position's logits."""
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
        """Estimates the bytes of weights, gradients, AdamW's states, activations and logits.

        A trained parameter takes 16 bytes: itself, its gradient and two moments in float32, or the same sum in mixed
        precision (Rajbhandari et al. 2020, "ZeRO", section 3.1). LoRA keeps the base model at `bits` and trains `rank` times
        `lora_width` parameters. With checkpointing, each layer stores its input only, and one layer at a time all activations
        (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5; without the attention matrix).
        """
        context = context or self.context
        if mode == "full":
            states = 16 * self.parameters
        else:
            states = self.size_bytes[bits] + 16 * rank * self.lora_width
        width = _DTYPE_BYTES[self.dtype]
        inputs = self.hidden_size * width
        # two norms and their inputs, queries, attention output, keys, values, gate, up, their activation and product
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        layer_activations = (4 * self.hidden_size + attention + 4 * self.intermediate_size) * width
        activations = self.layers * inputs + layer_activations if checkpointing else self.layers * layer_activations
        logits = self.vocab_size * (width + 4 + 4)  # the logits in `dtype`, in float32 for the loss, and their gradient
        return states + batch * context * (activations + logits)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as values that `json.dump` accepts."""
        plain = dataclasses.asdict(self)
        plain["size_bytes"] = {str(bits): size for bits, size in self.size_bytes.items()}
        return plain

    def __str__(self) -> str:
        """Returns a table for people."""
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
    """Formats a size in GiB, or in MiB below a tenth of a GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def spec(config: PretrainedConfig | str | Path, group_size: int = 128, dtype: str | None = None) -> ModelSpec:
    """Returns the spec of the model that a configuration describes.

    Args:
        config: a configuration of transformers, or its folder or hub id. For a multimodal model all parameters count, and
            the other fields describe the text decoder.
        group_size: weights that share a scale, in the sizes below 16 bits.
        dtype: type of the KV cache and of unquantized weights; by default that of the configuration, else bfloat16.

    Raises:
        ValueError: transformers has no causal LM for the configuration.
        UserError: the model is not a stack of decoder blocks with attention.
    """
    from transformers import AutoConfig

    from winnow.model.own_architectures import register

    register()
    full_config = AutoConfig.from_pretrained(config) if isinstance(config, str | Path) else config
    model = build_on_meta(full_config)
    text = full_config.get_text_config(decoder=True)
    dtype = dtype or str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(_DTYPE_BYTES)}")

    shapes = _block_matrices(model)
    linear = sum(math.prod(shape) for shape in shapes)
    groups = sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / group_size) for shape in shapes)
    embeddings = {id(w): w.numel() for w in _embedding_weights(model)}
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
        size_bytes={bits: _quantized_bytes(total, linear, groups, bits) for bits in WIDTHS},
        cache_windows=windows,
        kv_cache_bytes_per_token=len(windows) * (key + value) * _DTYPE_BYTES[dtype],
        lora_width=sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes),
    )


def context_of(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that a model takes, or None if its attention sets no limit."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")  # the common name; the name in MPT
    return next((value for name in names if (value := getattr(text, name, None))), None)


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """Builds the unquantized model of a configuration on the meta device, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from winnow.model.quiet import quiet

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # counts do not depend on how the weights are stored
    # the configuration's own code already runs
    trusted = type(config).__module__.startswith("transformers_modules.")
    with quiet(), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)  # type: ignore[no-untyped-call]
    return model


def _block_matrices(model: nn.Module) -> list[tuple[int, ...]]:
    """Returns the shapes [..., out, in] of the matrices in the decoder blocks: linear weights, and experts stacked in 3D."""
    from torch import nn

    from winnow.model.layers import decoder_blocks

    modules = [m for m in decoder_blocks(model).modules() if not isinstance(m, nn.Conv1d)]
    return [tuple(p.shape) for m in modules for p in m.parameters(recurse=False) if p.ndim >= 2]


def _embedding_weights(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight for layer in layers if layer is not None]


def _quantized_bytes(total: int, linear: int, groups: int, bits: int) -> int:
    if bits >= 16:
        return total * bits // 8
    return 2 * (total - linear) + math.ceil((linear * bits + groups * _SCALE_BITS) / 8)


def _cached_widths(text: Any, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Returns the numbers of elements of keys and of values that a layer caches per token, over all its heads.

    transformers caches latent attention (DeepSeek) in its expanded form, with keys wider than values.
    """
    if getattr(text, "kv_lora_rank", None):
        return text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim), (
            text.num_attention_heads * text.v_head_dim
        )
    return kv_heads * head_dim, kv_heads * head_dim


def _cache_windows(text: Any) -> tuple[int, ...]:
    """Returns the window of each layer with a growing KV cache, or 0 for no window.

    Layers with linear attention or a state space have a state of fixed size; layers that share another layer's cache have none.
    """
    window = getattr(text, "sliding_window", None) or 0
    if getattr(text, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    window_of_kind = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    window_of_kind["chunked_attention"] = getattr(text, "attention_chunk_size", None) or 0
    return tuple(window_of_kind[kind] for kind in kinds if kind in window_of_kind)
