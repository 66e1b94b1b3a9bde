"""Slices a student of a given shape out of a model: some of its layers, and the first of its channels, heads and dimensions.

The choice of the slice uses no data (method=[depth] and [width] choose by calibration data), as a student is trained anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WIDTHS = ("intermediate_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
SHAPE = ("num_hidden_layers", *WIDTHS)


def check_shape(shape: Mapping[str, object], option: str) -> None:
    """Raises UserError for a key that is no size of a student, or a value that is no size."""
    unknown = [key for key in shape if key not in SHAPE]
    if unknown or not shape:
        wrong = f"{', '.join(unknown)} cannot be set" if unknown else "it is empty"
        raise UserError(f"{option}: {wrong}; it takes {', '.join(SHAPE)}")
    for key, value in shape.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{option}.{key}={value}: it takes a whole number, at least 1")


def spaced_layers(layers: int, count: int) -> list[int]:
    """Returns `count` evenly spaced indices of `layers`, including the first and last; only the first if `count` is 1."""
    return [0] if count == 1 else [(i * (layers - 1) + (count - 1) // 2) // (count - 1) for i in range(count)]


def student_config(config: PretrainedConfig, shape: Mapping[str, int], option: str) -> PretrainedConfig:
    """Returns the configuration of the student.

    Raises:
        UserError: a size above the model's, or sizes that the architecture does not take together.
    """
    from winnow.method.depth import config_of_layers
    from winnow.method.width import head_dim
    from winnow.model.reshape import edit_config

    for key, value in shape.items():
        size = getattr(config, key, None)
        if size is None:
            raise UserError(f"{option}.{key}: {type(config).__name__} has no such size; leave it out")
        if value > size:
            raise UserError(f"{option}.{key}={value} is more than the model's {size}; it can only shrink")
    changes = {key: shape[key] for key in WIDTHS if key in shape}
    if "num_attention_heads" in shape and "num_key_value_heads" not in shape:  # keeps the size of head groups
        changes["num_key_value_heads"] = max(
            1, shape["num_attention_heads"] * config.num_key_value_heads // config.num_attention_heads
        )
    new = config
    if "num_hidden_layers" in shape:
        new = config_of_layers(config, spaced_layers(config.num_hidden_layers, shape["num_hidden_layers"]))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    queries, keys = changes.get("num_attention_heads", heads), changes.get("num_key_value_heads", kv_heads)
    group_size = heads // kv_heads
    if queries % keys or queries // keys > group_size:
        raise UserError(
            f"{option}: {queries} heads cannot be spread evenly over {keys} key/value heads, at most {group_size} each; "
            f"change num_attention_heads or num_key_value_heads"
        )
    try:
        return edit_config(new, **changes, **({"head_dim": head_dim(config)} if changes else {}))
    except ValueError as error:
        raise UserError(f"{option}: {type(config).__name__} does not take these sizes together: {error}") from error


def check_blocks(config: PretrainedConfig, shape: Mapping[str, int]) -> None:
    """Raises UserError if a width is to shrink, and the blocks are not plain attention and a gated MLP."""
    from winnow.method.width import layers_of
    from winnow.model.spec import build_on_meta

    if any(key in WIDTHS for key in shape):
        layers_of(build_on_meta(config))


def slice_student(model: PreTrainedModel, new: PretrainedConfig) -> PreTrainedModel:
    """Returns the student of a configuration from `smaller`, sliced out of `model`, which is changed in place.

    Raises:
        UserError: a width shrinks, and the blocks are not plain attention and a gated MLP.
    """
    import torch

    from winnow.method.importance import norms_of
    from winnow.method.width import layers_of, narrow_block, narrow_stream, strongest_heads
    from winnow.model.layers import decoder_blocks
    from winnow.model.reshape import rebuild_model

    old = model.config
    narrower = any(getattr(new, key) < getattr(old, key) for key in WIDTHS if getattr(old, key, None))
    if narrower:
        layers_of(model)  # raises UserError for other structures
    blocks = decoder_blocks(model)
    layers = spaced_layers(len(blocks), new.num_hidden_layers)
    for index in sorted(set(range(len(blocks))) - set(layers), reverse=True):
        del blocks[index]
    if narrower:
        size = old.hidden_size
        norms = [norm for block in blocks for _, norm in norms_of(block, size)] + [model.base_model.norm]
        hidden, channels = torch.arange(new.hidden_size), torch.arange(new.intermediate_size)
        # scores that rank the first heads highest
        in_order = -torch.arange(old.num_attention_heads, dtype=torch.float32)
        queries, keys = strongest_heads(
            in_order, old.num_key_value_heads, new.num_attention_heads, new.num_key_value_heads
        )
        for block in blocks:
            narrow_block(block, hidden, channels, queries, keys, new.head_dim)
        if new.hidden_size < size:
            narrow_stream(model, hidden, dict.fromkeys(norms, torch.full((size,), 1 / size)))
    return rebuild_model(model, new)
