"""GGUF files to read: tiny models of every family with tokenizers of both kinds, and files that are changed somewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.method.shapes import config_of
from winnow.model.gguf.read_vocabulary import SPLITS
from winnow.model.gguf.splits import WHOLE_WORDS
from winnow.model.gguf.vocabulary import SAMPLES
from winnow.model.lm import LM
from winnow.nano.items import held_out_text

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LOCAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-9-heads": ("llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 64}),
    "gemma3-local": ("gemma3_text", {"query_pre_attn_scalar": 64, "rope_parameters": LOCAL, "num_hidden_layers": 7,
                                     "layer_types": None}),
}  # fmt: skip


def texts() -> list[str]:
    return [item.completion for item in held_out_text(50)] + 20 * list(SAMPLES)


def byte_level(split: str = "smollm", bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on a few texts, which splits them in the way that llama.cpp has a name for."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=split in WHOLE_WORDS))
    built = {
        "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    steps = [built.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in SPLITS[split]]
    if "byte-level" not in SPLITS[split]:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    made.add_tokens(["<tool>"])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )


def sentencepiece_like(space_first: bool = True) -> Any:
    """A BPE tokenizer with bytes to fall back on and spaces as a letter, as SentencePiece's are in transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, limit_alphabet=70)
    learned.train_from_iterator(texts(), trainer)
    model = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {piece: index for index, piece in enumerate([*first, *pieces])}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("\u2581")] if space_first else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def random_model(shape: str, tokenizer: Any = None) -> LM:
    """A random model whose weights bfloat16 holds, with norms and biases that differ."""
    from transformers import AutoModelForCausalLM

    kind, settings = SHAPES[shape]
    tokenizer = tokenizer or (sentencepiece_like() if kind.startswith("gemma") else byte_level("qwen2"))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_of(
        kind, **{"vocab_size": len(tokenizer) + 5, "hidden_size": 256, "dtype": "float32", **ids, **settings}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())  # not model.bfloat16(), which rounds rotary frequencies, too
    return LM(model=model, tokenizer=tokenizer, name=shape)


def rewritten(
    source: Path,
    target: Path,
    keys: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
    tensor: Callable[[str, np.ndarray], tuple[np.ndarray, Any] | None] = lambda name, data: (data, None),
) -> Path:
    """The file with other values of `keys`, without keys and tensors, and with tensors `(data, type)` in the place of its own."""
    import gguf

    reader = gguf.GGUFReader(source)
    values = {**{n: f.contents() for n, f in reader.fields.items()}, **(keys or {})}
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        if name.startswith("GGUF.") or name in without:
            continue
        field = reader.fields.get(name)
        if field is None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
        else:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for held in reader.tensors:
        made = None if held.name in without else tensor(held.name, held.data)
        if made is not None:
            writer.add_tensor(held.name, np.ascontiguousarray(made[0]), raw_dtype=made[1] or held.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
