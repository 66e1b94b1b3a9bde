"""Which type llama.cpp gives each tensor of a quantized file, and the bytes that it takes.

A file type names a mix: the tensors that suffer most get more bits than the rest. What decides is the tensor's role and its
layer, and then its width: k-quants take 256 weights at a time, and a row that these do not divide gets a type of 32 instead.
The rules were read off llama.cpp's quantizer (as of llama-cpp-python 0.3.36); a test holds them against the files it writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCKS = {  # weights a block, and the bytes that it takes with its scales
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
ALIGNMENT = 32  # of each tensor in the file
DENSE = ("F32", "F16", "BF16")
_NARROW = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}


@dataclass(frozen=True)
class Model:
    """What of a model decides the types: its layers, query heads a key-value head, and whether it has a head of its own."""

    layers: int
    queries: int
    tied: bool
    sharing_70b: bool

    @classmethod
    def of(cls, config: PretrainedConfig, names: Mapping[str, object]) -> Model:
        queries = config.num_attention_heads // config.num_key_value_heads
        shares = queries > 1 or config.model_type == "qwen2"
        has_70b_shape = config.num_hidden_layers == 80 and config.model_type in ("llama", "mistral", "qwen2") and shares
        return cls(config.num_hidden_layers, queries, "lm_head.weight" not in names, has_70b_shape)


def tensor_type(file_type: str, name: str, shape: tuple[int, ...], model: Model) -> str:
    """The type of a tensor by its name in transformers, in a file of `file_type` (`Q4_K_M`, ..., `F16`).

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
    chosen = _by_role(file_type, name, width, model)
    return chosen if width % BLOCKS[chosen][0] == 0 else _NARROW[chosen]


def _by_role(file_type: str, name: str, width: int, model: Model) -> str:
    usual = file_type.removesuffix("_M")
    role = name.split(".")[-2]
    if role == "lm_head" or (role == "embed_tokens" and model.tied):
        return "Q8_0" if usual == "Q8_0" or width % BLOCKS[usual][0] else "Q6_K"
    if role not in ("v_proj", "o_proj", "down_proj") or ".layers." not in name:
        return usual
    layer = int(name.partition(".layers.")[2].partition(".")[0])
    if file_type in ("Q4_K_M", "Q5_K_M"):
        chosen = "Q6_K" if role != "o_proj" and _outer_or_third(layer, model.layers) else usual
    elif file_type == "Q3_K_M":
        first = layer < {"v_proj": 2, "down_proj": model.layers // 16, "o_proj": 0}[role]
        chosen = "Q5_K" if first else "Q4_K"
    elif file_type == "Q2_K":
        chosen = "Q4_K" if role == "v_proj" and model.queries >= 4 else "Q3_K"
    else:
        chosen = usual
    if role == "v_proj" and model.sharing_70b and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _outer_or_third(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third of those between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type in the file, padded."""
    weights, size = BLOCKS[kind]
    return math.ceil(math.prod(shape) // weights * size / ALIGNMENT) * ALIGNMENT
