"""Winnow's own architectures, made known to transformers: models with factorised linear layers (`modeling_lowrank`).

Their folders bring a copy of their code for those who have no winnow; here it is never run, the classes of this package are.
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
    """Makes transformers load these architectures without code from elsewhere; returns their classes by model type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from winnow.model.modeling_lowrank import MODELS

    models = {}
    for model in MODELS:
        config = model.config_class
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
        config.register_for_auto_class()  # `save_pretrained` writes their code and `auto_map` beside the weights
        model.register_for_auto_class("AutoModelForCausalLM")
        models[config.model_type] = model
    return models


def factorised(config: PretrainedConfig, ranks: Mapping[str, int]) -> tuple[PretrainedConfig, Any]:
    """The configuration of the same model with products of these ranks for the linear layers named, and its class.

    Raises:
        KeyError: there is none for the architecture.
    """
    model = register()[_PREFIX + config.model_type]
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    return model.config_class.from_dict({**settings, "low_rank": dict(ranks)}), model


def code_bytes() -> int:
    """Of the file of code in a folder."""
    from winnow.model import modeling_lowrank

    return Path(modeling_lowrank.__file__).stat().st_size
