"""Models of other shapes: a changed configuration, and the very model that transformers will make of it when it is loaded.

Structured compression changes tensors in place, describes the result by a configuration, and lets transformers put both
together again: so that what a module keeps besides its weights (scales, head counts, rotary tables) is never out of date.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def edited(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """A copy of a configuration with other values.

    Raises:
        ValueError: transformers does not take them together.
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


def rebuilt(model: PreTrainedModel, config: PretrainedConfig, kind: Any = None) -> PreTrainedModel:
    """The tensors of `model` as a model of `config`, as loading it will make it; they are shared, not copied.

    Args:
        model: whose tensors have the names and shapes of the new configuration already.
        kind: its class, where it is another one.

    Raises:
        RuntimeError: the tensors are not those of the configuration.
    """
    from winnow.model.quiet import quiet

    tensors = model.state_dict()
    with quiet():
        new, found = (kind or type(model)).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
        )
    wrong = {problem: sorted(map(str, names)) for problem, names in found.items() if names}
    if wrong:
        raise RuntimeError(f"the tensors do not fit the new configuration: {wrong}")
    new.generation_config = model.generation_config
    return new.to(model.device).eval()  # type: ignore[no-any-return]
