"""Defines the tokenizer data that GGUF stores, and the pre-tokenizer splits that have a name in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{many}{_LOWER}{few}" for many, few in (("*", "+"), ("+", "*"))]
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BUILT_IN = "byte-level"  # the split built into the ByteLevel pre-tokenizer
NAMED_SPLITS: Mapping[tuple[str, ...], str] = {  # steps of a pre-tokenizer -> llama.cpp's name for it
    (BUILT_IN,): "gpt-2",
    ("digits", BUILT_IN): "smollm",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}",): "qwen2",
    (f"{'|'.join(_CASED)}|\\p{{N}}|{_CASED_REST}",): "tekken",
    (f"{'|'.join(c + _CONTRACTIONS + '?' for c in _CASED)}|\\p{{N}}{{1,3}}|{_CASED_REST}",): "gpt-4o",
}
# splits of tokenizers that look a word up in the vocabulary before they merge its parts
WHOLE_WORDS = ("llama-bpe", "tekken")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer data in GGUF: `model` is `gpt2` or `llama`; `types` holds values of `gguf.TokenType`."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    space_prefix: bool | None = None
