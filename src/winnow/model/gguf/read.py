"""Reads the configuration and weights of a GGUF file as those of a transformers model, the inverse of `architectures`.

The `gguf` package dequantizes weights of quantized types. A file with unknown keys or tensors is refused with their names, because
a model that computes something else would be worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from winnow.model.gguf import architectures
from winnow.model.gguf.architectures import FAMILIES, Family
from winnow.model.gguf.file import File

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = {  # architecture in GGUF -> model type in transformers; the first one if there are several
    family.architecture: next(kind for kind, other in FAMILIES.items() if other.architecture == family.architecture)
    for family in FAMILIES.values()
}
CHUNK = 2**24  # number of weights dequantized at a time
_UNQUANTIZED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROPE_FACTORS = "rope_freqs.weight"
_KNOWN_KEYS = (
    "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base "
    "rope.freq_base_swa rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow"
).split()
_WINDOW_KEYS = (
    "attention.sliding_window attention.sliding_window_pattern attn_logit_softcapping final_logit_softcapping".split()
)
# keys without effect on these models
_IGNORED_KEYS = ("rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon")
# values at which a key has no effect; for other keys it is zero
_NEUTRAL_VALUES = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}


class _Keys:
    """The keys of a file that belong to its architecture."""

    def __init__(self, file: File) -> None:
        self.file, self.prefix = file, f"{file.architecture}."

    def __call__(self, name: str, default: Any = None) -> Any:
        """Returns a key's value, or the common value of a list with one per layer; without a default the key is required."""
        key = self.prefix + name
        value = self.file.required(key) if default is None else self.file.keys.get(key, default)
        if isinstance(value, list) and name != "attention.sliding_window_pattern":
            if len(set(value)) != 1:
                raise self.file.error(f"{key} differs between layers, which winnow cannot read")
            value = value[0]
        return _shortest_decimal(value) if isinstance(value, float) else value

    def check(self, family: Family) -> None:
        """Raises UserError for a key of the architecture that winnow does not know and that has an effect."""
        known_keys = {*_KNOWN_KEYS, *_IGNORED_KEYS, *(_WINDOW_KEYS if family.windows else ())}
        for key, value in self.file.keys.items():
            name = key.removeprefix(self.prefix)
            if (
                name != key
                and name not in known_keys
                and not (value == _NEUTRAL_VALUES[name] if name in _NEUTRAL_VALUES else not value)
            ):
                raise self.file.error(f"winnow does not know what {key}={value} asks for")


def _shortest_decimal(value: float) -> float:
    """Returns the shortest decimal with the same value in single precision: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def read_config(file: File) -> PretrainedConfig:
    """Returns the transformers configuration of the model in a file.

    Raises:
        UserError: the architecture is unknown, a key is missing, or a key has an unknown effect.
    """
    from transformers import AutoConfig

    if file.architecture not in MODEL_TYPES:
        raise file.error(
            f"its architecture is {file.architecture}, and winnow reads {', '.join(MODEL_TYPES)}",
            instead="give the model as a Hugging Face folder or hub id",
        )
    kind = MODEL_TYPES[file.architecture]
    family, key = FAMILIES[kind], _Keys(file)
    key.check(family)
    if "token_embd.weight" not in file.tensors:
        raise file.error("it lacks the tensor token_embd.weight")
    hidden, heads = key("embedding_length"), key("attention.head_count")
    width = key("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if key(name, width) != width:
            raise file.error(f"{key.prefix}{name}={key(name)} beside heads {width} wide, which winnow cannot read")
    ids = {name: file.keys.get(f"tokenizer.ggml.{gguf}_token_id") for name, gguf in _SPECIAL_TOKENS.items()}
    settings: dict[str, Any] = {
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(key, family),
        "use_cache": True,
        **ids,
    }
    if not family.square_heads or width * heads != hidden:
        settings["head_dim"] = width
    if kind in ("llama", "qwen3") or family.windows:
        settings["attention_bias"] = "blk.0.attn_output.bias" in file.tensors or "blk.0.attn_q.bias" in file.tensors
    if kind == "llama":
        settings["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if family.windows:
        settings |= _gemma_settings(key, kind, settings)
    config: PretrainedConfig = AutoConfig.for_model(kind, **settings)
    if _ROPE_FACTORS in file.tensors and family.rope_factors:
        _fit_llama3(file, config)
    architectures.family_of(config)
    return config


_SPECIAL_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _rope_parameters(key: _Keys, family: Family) -> dict[str, Any]:
    """Returns the rotary parameters; for Gemma 3, those of full and of sliding attention."""
    theta, scaling = float(key("rope.freq_base", 10000.0)), key("rope.scaling.type", "none")
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling in ("linear", "yarn"):
        full |= {"rope_type": scaling, "factor": key("rope.scaling.factor")}
    elif scaling != "none":
        raise key.file.error(f"{key.prefix}rope.scaling.type={scaling}, which winnow cannot read")
    if scaling == "yarn":
        full["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"{key.prefix}rope.scaling.yarn_{name}" in key.file.keys:
                full[name] = key(f"rope.scaling.yarn_{name}")
    if family.architecture != "gemma3":
        return full
    local = {"rope_type": "default", "rope_theta": float(key("rope.freq_base_swa", 10000.0))}
    return {"full_attention": full, "sliding_attention": local}


def _gemma_settings(key: _Keys, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that only Gemma's configuration has; missing keys get llama.cpp's defaults."""
    layers = settings["num_hidden_layers"]
    is_largest = layers == architectures.LARGEST_LAYERS[kind]
    assumed_width = settings["hidden_size"] // settings["num_attention_heads"] if is_largest else settings["head_dim"]
    gemma2 = kind == "gemma2"
    gemma_settings = {
        "query_pre_attn_scalar": assumed_width,  # the weights in a file fit llama.cpp's own scale of the scores
        "sliding_window": key("attention.sliding_window", 4096 if gemma2 else None),
        "attn_logit_softcapping": key("attn_logit_softcapping", 50.0 if gemma2 else 0.0) or None,
        "final_logit_softcapping": key("final_logit_softcapping", 30.0 if gemma2 else 0.0) or None,
    }
    pattern = key("attention.sliding_window_pattern", 2 if gemma2 else 6)
    if not isinstance(pattern, list):  # the last of every `pattern` layers has full attention
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    gemma_settings["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return gemma_settings


def _fit_llama3(file: File, config: PretrainedConfig) -> None:
    """Finds the parameters of Llama 3's scaling from the factor of each rotary frequency, which is all that a file holds.

    All published models scale between wavelengths of a quarter of the original context and all of it, which is a power of two.
    """
    factors = read_tensor(file, _ROPE_FACTORS)
    parameters = config.rope_parameters
    if bool((factors == 1).all()):
        return
    if parameters["rope_type"] != "default":
        raise file.error(f"it scales positions twice, by {_ROPE_FACTORS} and by {parameters['rope_type']}")
    for length in (2**power for power in range(5, 21)):
        config.rope_parameters = {
            **parameters,
            "rope_type": "llama3",
            "factor": _shortest_decimal(round(float(factors.max()), 4)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        candidate = architectures.rope_factors(config)
        if (
            candidate is not None
            and candidate.shape == factors.shape
            and torch.allclose(candidate, factors, rtol=1e-4, atol=0)
        ):
            return
    raise file.error(f"its {_ROPE_FACTORS} is no scaling of Llama 3's that winnow knows")


def dtype_of(file: File) -> torch.dtype:
    """Returns the dtype of the converted weights: that of the file's matrices, if they are not quantized.

    Matrices of several such types become float32, which holds them all. Quantized weights become bfloat16, in which the models of
    these families are published: float32 would double the usual size of a study's base model, and float16 overflows in the
    activations of some models. Rounding costs little compared with quantizing: for SmolLM2-135M in Q4_1, on 8,176 tokens of
    WikiText-2, the perplexity is 29.564 as float32, 29.564 as float16 and 29.557 as bfloat16.
    """
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if not kinds <= set(_UNQUANTIZED):
        return torch.bfloat16
    return _UNQUANTIZED[kinds.pop()] if len(kinds) == 1 else torch.float32


def read_tensor(file: File, name: str, order: torch.Tensor | None = None) -> torch.Tensor:
    """Returns a tensor in single precision, with its rows in `order` if that is given."""
    parts = list(_chunks(file, name, order))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(file: File, name: str, order: torch.Tensor | None) -> Iterator[torch.Tensor]:
    import gguf

    tensor = file.tensors[name]
    data = tensor.data if order is None else tensor.data[order.numpy()]  # each row is quantized separately
    rows = max(1, CHUNK // math.prod(int(n) for n in tensor.shape[:-1])) if len(tensor.shape) > 1 else len(data)
    for start in range(0, len(data), rows):
        try:
            part = gguf.quants.dequantize(data[start : start + rows], tensor.tensor_type)
        except NotImplementedError:
            raise file.error(f"{name} is of the type {tensor.tensor_type.name}, which gguf cannot dequantize") from None
        yield torch.tensor(part, dtype=torch.float32)


class Weights:
    """The weights in a file by their names in transformers, dequantized on access.

    Attributes:
        shapes: shapes of all weights, in the order of the model; tied ones once.
        model: the transformers model without weights.

    Raises:
        UserError: a tensor is missing, has another shape, or is not a part of the model.
    """

    def __init__(self, file: File, config: PretrainedConfig) -> None:
        from winnow.model.spec import build_on_meta

        self.file, self.config = file, config
        names = architectures.TensorNames(config)
        model = build_on_meta(config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.model = model
        self._names = {name: names[name] for name in self.shapes}
        for name, gguf_name in self._names.items():
            if gguf_name not in file.tensors:
                raise file.error(f"it lacks the tensor {gguf_name} ({name})")
            file_shape = tuple(int(n) for n in reversed(file.tensors[gguf_name].shape))
            if file_shape != self.shapes[name]:
                raise file.error(
                    f"its tensor {gguf_name} is {file_shape}, and the model's {name} is {self.shapes[name]}"
                )
        unused = set(file.tensors) - set(self._names.values())
        if FAMILIES[config.model_type].rope_factors:
            unused.discard(_ROPE_FACTORS)
        if unused:
            raise file.error(
                f"it holds tensors that a {config.model_type} has no place for: {', '.join(sorted(unused)[:3])}"
            )

    def __getitem__(self, name: str) -> Iterator[torch.Tensor]:
        """Yields the rows of a weight in single precision, in chunks: the inverse of `architectures.to_gguf`."""
        gguf_name = self._names[name]
        family = FAMILIES[self.config.model_type]
        layer_part = gguf_name.split(".")[-2]
        order = None
        if family.paired and layer_part in ("attn_q", "attn_k"):
            heads = self.config.num_attention_heads if layer_part == "attn_q" else self.config.num_key_value_heads
            # rows (head, frequency, half) become (head, half, frequency)
            order = torch.arange(self.shapes[name][0]).view(heads, -1, 2).transpose(1, 2).flatten()
        for part in _chunks(self.file, gguf_name, order):
            yield part - family.norm_offset if layer_part.endswith("norm") and family.norm_offset else part
