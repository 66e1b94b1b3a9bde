"""Predicts whether a model's decode step can be captured in a CUDA graph (`graphs`).

A model is checked in memory, before its first request. The base model of a search is checked from its configuration alone, and by
capturing a few random layers of that configuration if the search runs on the machine with the device. That takes seconds, whatever
the size of the model.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from winnow.runtime import graphs
from winnow.runtime.graphs import FULL, SLIDING

logger = logging.getLogger(__name__)

ATTENTIONS = ("sdpa", "eager")  # the implementations that `graphs` can build masks for
PLAIN_CACHES = (None, "dynamic", "hybrid", "static")  # `generate` computes the same with each of them


def unsupported_reason(model: Any, generation: Any = None) -> str | None:
    """Returns why the decode step of a model cannot be captured, as a clause about it; None if no obstacle is known.

    Args:
        model: in memory, or on the meta device; may be a PEFT model.
        generation: the generation settings, if they are not the model's own.
    """
    return next(_obstacles(model, generation), None)


def _obstacles(model: Any, generation: Any) -> Iterator[str]:
    from winnow.model import adapter

    if adapter.virtual_tokens(model):
        yield "it has a soft prompt, which PEFT puts before the text in Python"
    model = adapter.base_model(model)
    cache = getattr(generation or model.generation_config, "cache_implementation", None)
    if cache not in PLAIN_CACHES:
        yield f"its generation settings ask for a cache of their own (cache_implementation={cache})"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        yield "it is spread over several devices"
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    if not getattr(model, "_can_compile_fullgraph", False):
        yield f"transformers does not say of {name} that it works with a static cache"
    if "position_ids" not in inspect.signature(type(model).forward).parameters or getattr(text, "alibi", False):
        yield f"{name} takes its positions from the attention mask"
    yield from _obstacles_of_attention(model.config, text)
    yield from _obstacles_of_format(getattr(model.config, "quantization_config", None))


def _obstacles_of_attention(config: Any, text: Any) -> Iterator[str]:
    if config._attn_implementation not in ATTENTIONS:
        yield f"its attention is {config._attn_implementation}, not one of {', '.join(ATTENTIONS)}"
    kinds = sorted(set(get_layer_types_and_kwargs(text)[0]) - {FULL, SLIDING})
    if kinds:
        yield f"it has layers of kind {', '.join(kinds)}"
    if getattr(text, "num_kv_shared_layers", None):
        yield "its layers share keys and values"
    if {"dynamic", "longrope"} & set(_rope_types(getattr(text, "rope_parameters", None) or {})):
        yield "its rotary embedding depends on how long the text is, which is looked up on the host"


def _rope_types(parameters: Any) -> Iterator[str]:
    """Yields the rope types of a configuration, which may be nested by kind of layer."""
    for key, value in parameters.items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif key == "rope_type":
            yield str(value)


def _obstacles_of_format(quantization_config: Any) -> Iterator[str]:
    if quantization_config is None:
        return
    settings = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    if settings.get("load_in_8bit"):
        yield "bitsandbytes' 8-bit layers look for outliers on the host"
    groups = settings.get("config_groups") or {}
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        yield "compressed-tensors copies a number from the host for the scales of its activations"


def unsupported_base_reason(
    path: str, attention: str, trust_remote_code: bool, device: str | None
) -> dict[str, str | None]:
    """Returns `unsupported_reason` of the model at `path` as `because`, without reading its weights; runs in a child process.

    Args:
        device: device on which a few layers like the model's own are captured, if no obstacle is known; None skips the capture.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from winnow.hardware.lock import shared_device
    from winnow.model.lm import LM
    from winnow.model.loading import Loading
    from winnow.model.quiet import quiet

    loading = Loading(attention=attention, trust_remote_code=trust_remote_code)
    config = LM(path, loading=loading).config()
    settings = {"attn_implementation": loading.attn_implementation, "trust_remote_code": trust_remote_code}
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **settings)
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # the model has none
            generation = model.generation_config
    reason = unsupported_reason(model, generation)
    if reason is None and device is not None:
        with shared_device(device), quiet():
            try:
                with torch.device(device):
                    model = AutoModelForCausalLM.from_config(few_layers(config), **settings).eval()
            except Exception as error:  # out of memory, or an unusual configuration; the base model's trial will tell
                logger.info(f"whether {path} can be captured is left to its own trial: {type(error).__name__}")
            else:
                reason = try_capture(model)
    return {"because": reason}


def few_layers(config: Any) -> Any:
    """Returns the configuration with the fewest layers that include one of each kind of attention."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    count = min(text.num_hidden_layers, max(map(kinds.index, set(kinds))) + 1 if kinds else 1)
    if kinds:
        text.layer_types = list(kinds[:count])
    text.num_hidden_layers = count
    return config


def try_capture(model: Any) -> str | None:
    """Tries to answer a request from a graph and returns why that fails; None if it works."""
    prompt_bt = torch.zeros(1, 8, dtype=torch.int64, device=model.device)
    try:
        with torch.inference_mode():
            decoder = graphs.Decoder(model, prompt_bt, 4)
            decoder.rest()
            decoder.tokens_bn.tolist()  # waits for the device
    except torch.OutOfMemoryError:
        return None  # says nothing about graphs
    except Exception as error:
        return graphs.failure(error)
    return None
