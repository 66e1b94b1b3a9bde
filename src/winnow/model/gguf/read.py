"""A GGUF file read as a model of transformers: its configuration and its weights, the inverse of `architectures`.

Weights of quantized types are what the `gguf` package dequantizes them to. What a file holds beyond what is known here is
refused by name: a model that computes something else would be worse than none.
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

KINDS = {  # of transformers, by GGUF's name; of several the first
    family.architecture: next(kind for kind, other in FAMILIES.items() if other.architecture == family.architecture)
    for family in FAMILIES.values()
}
CHUNK = 2**24  # weights that are dequantized at a time
_EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FREQUENCIES = "rope_freqs.weight"
_READ = (
    "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base "
    "rope.freq_base_swa rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow"
).split()
_READ_OF_WINDOWS = (
    "attention.sliding_window attention.sliding_window_pattern attn_logit_softcapping final_logit_softcapping".split()
)
_IDLE = ("rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon")  # of no effect on these models
_NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}  # of no effect at this value; others at zero


class _Keys:
    """The keys of a file that belong to its architecture."""

    def __init__(self, file: File) -> None:
        self.file, self.prefix = file, f"{file.architecture}."

    def __call__(self, name: str, default: Any = None) -> Any:
        """A value, one that is given for each layer alike as that one; without a default it must be there."""
        key = self.prefix + name
        value = self.file.need(key) if default is None else self.file.keys.get(key, default)
        if isinstance(value, list) and name != "attention.sliding_window_pattern":
            if len(set(value)) != 1:
                raise self.file.refused(f"{key} differs between layers, which winnow cannot read")
            value = value[0]
        return _shortest(value) if isinstance(value, float) else value

    def check(self, family: Family) -> None:
        known = {*_READ, *_IDLE, *(_READ_OF_WINDOWS if family.windows else ())}
        for key, value in self.file.keys.items():
            name = key.removeprefix(self.prefix)
            if name != key and name not in known and not (value == _NEUTRAL[name] if name in _NEUTRAL else not value):
                raise self.file.refused(f"winnow does not know what {key}={value} asks for")


def _shortest(value: float) -> float:
    """The number of fewest digits with the same single precision: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def configuration(file: File) -> PretrainedConfig:
    """The configuration of transformers for the model in a file.

    Raises:
        UserError: its architecture is not known, a key is missing, or one asks for what is not known.
    """
    from transformers import AutoConfig

    if file.architecture not in KINDS:
        raise file.refused(
            f"its architecture is {file.architecture}, and winnow reads {', '.join(KINDS)}",
            instead="give the model as a Hugging Face folder or hub id",
        )
    kind = KINDS[file.architecture]
    family, key = FAMILIES[kind], _Keys(file)
    key.check(family)
    if "token_embd.weight" not in file.tensors:
        raise file.refused("it lacks the tensor token_embd.weight")
    hidden, heads = key("embedding_length"), key("attention.head_count")
    width = key("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if key(name, width) != width:
            raise file.refused(f"{key.prefix}{name}={key(name)} beside heads {width} wide, which winnow cannot read")
    ids = {name: file.keys.get(f"tokenizer.ggml.{gguf}_token_id") for name, gguf in _SPECIAL_IDS.items()}
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
        "rope_parameters": _rope(key, family),
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
        settings |= _of_gemma(key, kind, settings)
    config: PretrainedConfig = AutoConfig.for_model(kind, **settings)
    if _FREQUENCIES in file.tensors and family.rope_factors:
        _fit_llama3(file, config)
    architectures.family_of(config)
    return config


_SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _rope(key: _Keys, family: Family) -> dict[str, Any]:
    """The rotary parameters; where layers of sliding attention have others, both."""
    theta, scaling = float(key("rope.freq_base", 10000.0)), key("rope.scaling.type", "none")
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling in ("linear", "yarn"):
        full |= {"rope_type": scaling, "factor": key("rope.scaling.factor")}
    elif scaling != "none":
        raise key.file.refused(f"{key.prefix}rope.scaling.type={scaling}, which winnow cannot read")
    if scaling == "yarn":
        full["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if f"{key.prefix}rope.scaling.yarn_{name}" in key.file.keys:
                full[name] = key(f"rope.scaling.yarn_{name}")
    if family.architecture != "gemma3":
        return full
    local = {"rope_type": "default", "rope_theta": float(key("rope.freq_base_swa", 10000.0))}
    return {"full_attention": full, "sliding_attention": local}


def _of_gemma(key: _Keys, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What only Gemma's configuration has. llama.cpp's own values stand for keys that are missing."""
    layers = settings["num_hidden_layers"]
    largest = layers == architectures.LARGEST_LAYERS[kind]
    assumed = settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"]
    gemma2 = kind == "gemma2"
    found = {
        "query_pre_attn_scalar": assumed,  # the weights of a file are those for llama.cpp's own scale of the scores
        "sliding_window": key("attention.sliding_window", 4096 if gemma2 else None),
        "attn_logit_softcapping": key("attn_logit_softcapping", 50.0 if gemma2 else 0.0) or None,
        "final_logit_softcapping": key("final_logit_softcapping", 30.0 if gemma2 else 0.0) or None,
    }
    pattern = key("attention.sliding_window_pattern", 2 if gemma2 else 6)
    if not isinstance(pattern, list):  # of so many layers the last sees everything
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return found


def _fit_llama3(file: File, config: PretrainedConfig) -> None:
    """Finds the parameters of Llama 3's scaling, of which a file has only what they make of each rotary frequency.

    All published models scale between wavelengths of a quarter and the whole of a first context, which is a power of two.
    """
    factors = values(file, _FREQUENCIES)
    plain = config.rope_parameters
    if bool((factors == 1).all()):
        return
    if plain["rope_type"] != "default":
        raise file.refused(f"it scales positions twice, by {_FREQUENCIES} and by {plain['rope_type']}")
    for length in (2**power for power in range(5, 21)):
        config.rope_parameters = {
            **plain,
            "rope_type": "llama3",
            "factor": _shortest(round(float(factors.max()), 4)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        made = architectures.rope_factors(config)
        if made is not None and made.shape == factors.shape and torch.allclose(made, factors, rtol=1e-4, atol=0):
            return
    raise file.refused(f"its {_FREQUENCIES} is no scaling of Llama 3's that winnow knows")


def dtype_of(file: File) -> torch.dtype:
    """What the weights of a file are kept as: the type of its matrices where they have one that is not quantized.

    Of several such types float32 holds all. Quantized weights become bfloat16, in which the models of these families are
    published: float32 would make the base model of a study twice the size that it has anywhere else, and float16 overflows in
    the activations of some. What rounding costs is small beside what quantizing has: measured on SmolLM2-135M in Q4_1, on 8,176
    tokens of WikiText-2, the perplexity is 29.564 as float32, 29.564 as float16 and 29.557 as bfloat16.
    """
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if not kinds <= set(_EXACT):
        return torch.bfloat16
    return _EXACT[kinds.pop()] if len(kinds) == 1 else torch.float32


def values(file: File, name: str, order: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor in single precision, its rows in another order where one is given."""
    parts = list(_chunks(file, name, order))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(file: File, name: str, order: torch.Tensor | None) -> Iterator[torch.Tensor]:
    import gguf

    tensor = file.tensors[name]
    data = tensor.data if order is None else tensor.data[order.numpy()]  # a row is quantized by itself
    rows = max(1, CHUNK // math.prod(int(n) for n in tensor.shape[:-1])) if len(tensor.shape) > 1 else len(data)
    for start in range(0, len(data), rows):
        try:
            part = gguf.quants.dequantize(data[start : start + rows], tensor.tensor_type)
        except NotImplementedError:
            raise file.refused(
                f"{name} is of the type {tensor.tensor_type.name}, which gguf cannot dequantize"
            ) from None
        yield torch.tensor(part, dtype=torch.float32)


class Weights:
    """The weights in a file, by their names in transformers, each as one needs it.

    Attributes:
        shapes: of all of them, in the order of the model; tied ones once.
        model: the class of transformers, without weights.

    Raises:
        UserError: a tensor is missing, has another shape, or is one that the model has no place for.
    """

    def __init__(self, file: File, config: PretrainedConfig) -> None:
        from winnow.model.spec import on_meta

        self.file, self.config = file, config
        names = architectures.Names(config)
        model = on_meta(config)  # without weights
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.model = model
        self._names = {name: names[name] for name in self.shapes}
        for name, theirs in self._names.items():
            if theirs not in file.tensors:
                raise file.refused(f"it lacks the tensor {theirs} ({name})")
            found = tuple(int(n) for n in reversed(file.tensors[theirs].shape))
            if found != self.shapes[name]:
                raise file.refused(f"its tensor {theirs} is {found}, and the model's {name} is {self.shapes[name]}")
        left = set(file.tensors) - set(self._names.values())
        if FAMILIES[config.model_type].rope_factors:
            left.discard(_FREQUENCIES)
        if left:
            raise file.refused(
                f"it holds tensors that a {config.model_type} has no place for: {', '.join(sorted(left)[:3])}"
            )

    def __getitem__(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a weight in single precision, some at a time: the inverse of `architectures.converted`."""
        theirs = self._names[name]
        family = FAMILIES[self.config.model_type]
        layer_part = theirs.split(".")[-2]
        order = None
        if family.paired and layer_part in ("attn_q", "attn_k"):
            heads = self.config.num_attention_heads if layer_part == "attn_q" else self.config.num_key_value_heads
            # rows (head, frequency, half) become (head, half, frequency)
            order = torch.arange(self.shapes[name][0]).view(heads, -1, 2).transpose(1, 2).flatten()
        for part in _chunks(self.file, theirs, order):
            yield part - family.norm_offset if layer_part.endswith("norm") and family.norm_offset else part
