"""Rebuilds a model with other shapes from a changed configuration, as transformers will load it.

Structured compression changes tensors in place, describes the result by a configuration, and lets transformers build the model
from both. The other values that modules hold (scales, head counts, rotary tables) are then always up to date.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def edit_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Returns a copy of a configuration with changed values.

    Raises:
        ValueError: transformers rejects the combination of values.
    """
    from huggingface_hub.errors import StrictDataclassError

    new = copy.deepcopy(config)
    try:
        for name, value in changes.items():
            setattr(new, name, value)
        new.validate()
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    return new


def rebuild_model(model: PreTrainedModel, config: PretrainedConfig, kind: Any = None) -> PreTrainedModel:
    """Returns a model of `config` with the tensors of `model`, which are shared, not copied.

    Args:
        model: its tensors already have the names and shapes of the new configuration.
        kind: the class of the new model, if it differs.

    Raises:
        RuntimeError: the tensors do not match the configuration.
    """
    from winnow.model.quiet import quiet

    tensors = model.state_dict()
    with quiet():
        new, loading_info = (kind or type(model)).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
        )
    mismatches = {problem: sorted(map(str, names)) for problem, names in loading_info.items() if names}
    if mismatches:
        raise RuntimeError(f"the tensors do not fit the new configuration: {mismatches}")
    new.generation_config = model.generation_config
    return new.to(model.device).eval()  # type: ignore[no-any-return]
