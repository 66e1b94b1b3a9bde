"""Predicts the type that llama.cpp gives each tensor of a quantized file, and the tensor's size in bytes.

A file type names a mix, in which the most sensitive tensors get more bits. The type depends on the tensor's role, its layer and
its width: k-quants take blocks of 256 weights, and a row width that 256 does not divide gets a type with blocks of 32 instead.
The rules come from llama.cpp's quantizer (as of llama-cpp-python 0.3.36); a test compares them with the files that it writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCKS = {  # type -> (weights per block, bytes per block with its scales)
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_0": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
}
ALIGNMENT = 32  # bytes to which each tensor in the file is aligned
DENSE = ("F32", "F16", "BF16")
_NARROW = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that decide the types; `tied` says that the output head shares the token embedding."""

    layers: int
    queries_per_kv_head: int
    tied: bool
    has_70b_shape: bool

    @classmethod
    def of(cls, config: PretrainedConfig, names: Mapping[str, object]) -> ModelShape:
        queries_per_kv_head = config.num_attention_heads // config.num_key_value_heads
        shares_kv_heads = queries_per_kv_head > 1 or config.model_type == "qwen2"
        has_70b_shape = (
            config.num_hidden_layers == 80 and config.model_type in ("llama", "mistral", "qwen2") and shares_kv_heads
        )
        return cls(config.num_hidden_layers, queries_per_kv_head, "lm_head.weight" not in names, has_70b_shape)


def tensor_type(file_type: str, name: str, shape: tuple[int, ...], model: ModelShape) -> str:
    """Returns the type of a tensor, given its name in transformers, in a file of `file_type` (`Q4_K_M`, ..., `F16`).

    Raises:
        UserError: a matrix is too narrow for any quantized type.
    """
    if len(shape) < 2:
        return "F32"
    if file_type in DENSE:
        return file_type
    width = shape[-1]
    if width % 32:
        raise UserError(
            f"method.gguf.type={file_type}: {name} is {width} wide, and llama.cpp quantizes 32 weights at a time; "
            f"set method.gguf.dense=F16, or leave the width a multiple of 32"
        )
    chosen = _type_by_role(file_type, name, width, model)
    return chosen if width % BLOCKS[chosen][0] == 0 else _NARROW[chosen]


def _type_by_role(file_type: str, name: str, width: int, model: ModelShape) -> str:
    base_type = file_type.removesuffix("_M")
    role = name.split(".")[-2]
    if role == "lm_head" or (role == "embed_tokens" and model.tied):
        return "Q8_0" if base_type == "Q8_0" or width % BLOCKS[base_type][0] else "Q6_K"
    if role not in ("v_proj", "o_proj", "down_proj") or ".layers." not in name:
        return base_type
    layer = int(name.partition(".layers.")[2].partition(".")[0])
    if file_type in ("Q4_K_M", "Q5_K_M"):
        chosen = "Q6_K" if role != "o_proj" and _has_more_bits(layer, model.layers) else base_type
    elif file_type == "Q3_K_M":
        is_early_layer = layer < {"v_proj": 2, "down_proj": model.layers // 16, "o_proj": 0}[role]
        chosen = "Q5_K" if is_early_layer else "Q4_K"
    elif file_type == "Q2_K":
        chosen = "Q4_K" if role == "v_proj" and model.queries_per_kv_head >= 4 else "Q3_K"
    else:
        chosen = base_type
    if role == "v_proj" and model.has_70b_shape and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _has_more_bits(layer: int, layers: int) -> bool:
    """Returns whether a layer is in the first or last eighth of the layers, or one of every three between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Returns the padded size in bytes of a tensor of this type in the file."""
    block_weights, block_bytes = BLOCKS[type_name]
    return math.ceil(math.prod(shape) // block_weights * block_bytes / ALIGNMENT) * ALIGNMENT
