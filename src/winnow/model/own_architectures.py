"""Registers winnow's own architectures with transformers: models with factorised linear layers (`modeling_lowrank`).

Their folders hold a copy of the code for users without winnow. winnow never runs this copy; it uses the classes of this package.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PREFIX = "lowrank_"
FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
MODEL_TYPES = tuple(_PREFIX + family for family in FAMILIES)


@functools.cache
def register() -> Mapping[str, Any]:
    """Registers the architectures with transformers, once per process; returns their classes by model type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from winnow.model.modeling_lowrank import MODELS

    models = {}
    for model in MODELS:
        config = model.config_class
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
        config.register_for_auto_class()  # `save_pretrained` writes the code and `auto_map` next to the weights
        model.register_for_auto_class("AutoModelForCausalLM")
        models[config.model_type] = model
    return models


def factorised_architecture(config: PretrainedConfig, ranks: Mapping[str, int]) -> tuple[PretrainedConfig, Any]:
    """Returns the configuration and class of a model whose named linear layers are products of the given ranks.

    Raises:
        KeyError: winnow has no low-rank version of the architecture.
    """
    model = register()[_PREFIX + config.model_type]
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    return model.config_class.from_dict({**settings, "low_rank": dict(ranks)}), model


def code_bytes() -> int:
    """Returns the size of the code file that is saved with the weights."""
    from winnow.model import modeling_lowrank

    return Path(modeling_lowrank.__file__).stat().st_size
