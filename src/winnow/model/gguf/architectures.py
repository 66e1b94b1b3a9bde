"""Describes the model families of transformers in GGUF: keys, tensor names, and differences in their weights.

llama.cpp computes each architecture in one fixed way. A configuration that differs from it has no key in GGUF, and is refused
rather than written incompletely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap
    from transformers import PretrainedConfig

# rotary parameters without a key in GGUF -> the only value that can be written
_ROPE_WITHOUT_KEYS = {"partial_rotary_factor": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
# llama.cpp recognises the largest Gemma by its number of layers, and scales its attention scores differently
LARGEST_LAYERS = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        architecture: its name in GGUF.
        activation: the fixed activation of the feed-forward layers.
        paired: rotary embeddings rotate neighbouring rows of q and k, while transformers rotates the two halves of a head.
        norm_offset: the value that transformers adds to a norm's weights in the forward pass.
        windows: whether sliding attention is supported; otherwise every layer attends to all positions.
        rope_factors: whether one factor per rotary frequency is supported (Llama 3's scaling).
        square_heads: whether the heads together must be as wide as the model.
        token_bytes: typical size of a token in the file: text and merges, or text and score.
    """

    architecture: str
    activation: str = "silu"
    paired: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    rope_factors: bool = False
    square_heads: bool = False
    token_bytes: int = 36


_GEMMA = Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, windows=True, token_bytes=22)
FAMILIES = {
    "llama": Family("llama", paired=True, rope_factors=True),
    "mistral": Family("llama", paired=True, rope_factors=True),
    "qwen2": Family("qwen2", square_heads=True),
    "qwen3": Family("qwen3"),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, architecture="gemma3"),
}


def family_of(config: PretrainedConfig) -> Family:
    """Returns the llama.cpp architecture that computes a model of this configuration.

    Raises:
        UserError: there is no such architecture, or it does not support the configuration.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"method.gguf cannot write a model of type {config.model_type}: it knows {', '.join(FAMILIES)}; "
            f"take another quantization method"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in (family.activation, {"silu": "swish"}.get(family.activation)):
        raise _unsupported_error(config, f"hidden_act={activation}", f"only {family.activation}")
    if family.square_heads and config.num_attention_heads * head_dim(config) != config.hidden_size:
        raise _unsupported_error(
            config,
            f"{config.num_attention_heads} heads of {head_dim(config)} beside hidden_size={config.hidden_size}",
            "only heads that are together as wide as the model",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise _unsupported_error(config, "use_bidirectional_attention", "only causal attention")
    for parameters in _rope(config):
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "yarn") and not (kind == "llama3" and family.rope_factors):
            raise _unsupported_error(config, f"rope_type={kind}", "no such scaling of positions")
        unsupported = [k for k, plain in _ROPE_WITHOUT_KEYS.items() if parameters.get(k) not in (None, plain)]
        if unsupported:
            raise _unsupported_error(
                config, f"{unsupported[0]}={parameters[unsupported[0]]}", "no such rotary embedding"
            )
    return family


def _unsupported_error(config: PretrainedConfig, what: str, instead: str) -> UserError:
    return UserError(
        f"method.gguf: llama.cpp computes {instead} for a {config.model_type}, and this one has {what}; "
        f"take another quantization method"
    )


def head_dim(config: PretrainedConfig) -> int:
    """Returns the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: PretrainedConfig) -> int:
    """Returns the longest sequence for which llama.cpp computes the same as transformers.

    If llama.cpp's architecture has no sliding attention (Mistral, Qwen2), the two agree only up to the window.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        window = None
    if FAMILIES[config.model_type].windows or not window:
        return int(config.max_position_embeddings)
    return int(min(window, config.max_position_embeddings))


def add_keys(writer: GGUFWriter, config: PretrainedConfig, rows: int) -> None:
    """Writes the keys that describe the architecture; `rows` is the number of rows of the token embedding."""
    import gguf

    family, width = family_of(config), head_dim(config)
    writer.add_vocab_size(rows)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)

    rope, *local = _rope(config)
    sliding = [kind == "sliding_attention" for kind in config.layer_types] if family.windows else []
    window = config.sliding_window if family.windows else None
    if sliding and not any(sliding):
        # llama.cpp aborts if no layer slides: declare one with a window over all positions
        sliding[-1], window, local = True, config.max_position_embeddings, [rope] if local else []
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local[0]["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        _add_yarn(writer, rope, config)
    if family.windows:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern(sliding)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_yarn(writer: GGUFWriter, rope: dict[str, Any], config: PretrainedConfig) -> None:
    import gguf

    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _rope(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Returns the rotary parameters of full attention layers, and those of sliding attention layers if they differ."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        return [parameters["full_attention"], parameters["sliding_attention"]]
    return [parameters]


def rope_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """Returns the divisor of each rotary frequency [head_dim / 2] in Llama 3's scaling; None for other scalings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (rope, *_), width = _rope(config), head_dim(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors: torch.Tensor = plain / scaled.double()
    return factors.float()


class TensorNames:
    """Maps a model's tensor names in transformers to those in GGUF."""

    def __init__(self, config: PretrainedConfig) -> None:
        import gguf

        architecture = family_of(config).architecture
        architecture_keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self.config = config
        self.map: TensorNameMap = gguf.get_tensor_name_map(architecture_keys[architecture], config.num_hidden_layers)

    def __getitem__(self, name: str) -> str:
        """Returns the GGUF name of a tensor; raises UserError if the architecture has no such tensor."""
        gguf_name: str | None = self.map.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(
                f"method.gguf: llama.cpp knows no tensor {name} in a {self.config.model_type}; "
                f"start from a model of plain weights (merge adapters first)"
            )
        return gguf_name


def to_gguf(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Converts a weight of transformers, given its GGUF name, to the layout that llama.cpp expects."""
    family = FAMILIES[config.model_type]
    layer_part = name.split(".")[-2]
    if family.paired and layer_part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if layer_part == "attn_q" else config.num_key_value_heads
        # rows (head, half, frequency) become (head, frequency, half)
        paired: torch.Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return paired
    if layer_part.endswith("norm"):
        tensor = tensor.float() + family.norm_offset
    scale = _query_scale(config)
    if scale != 1 and layer_part == ("attn_q_norm" if config.model_type == "gemma3_text" else "attn_q"):
        tensor = tensor.float() * scale
    return tensor


def _query_scale(config: PretrainedConfig) -> float:
    """Returns the factor on the queries that corrects llama.cpp's score scale to that of the configuration."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return 1.0
    is_largest = config.num_hidden_layers == LARGEST_LAYERS[config.model_type]
    assumed_width = config.hidden_size // config.num_attention_heads if is_largest else head_dim(config)
    return math.sqrt(assumed_width / scalar)
