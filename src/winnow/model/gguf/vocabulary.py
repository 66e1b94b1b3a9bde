"""Writes a transformers tokenizer as a GGUF vocabulary.

Two kinds of llama.cpp matter here: byte-level BPE (`gpt2`: tokens, merges, and the *name* of a pre-tokenizer split, because a
file cannot hold the regular expression itself), and SentencePiece (`llama`: tokens with scores). A split without a name is
written as the one whose ids agree best with the tokenizer's on sample texts. Any other tokenizer is written without texts
(`none`): the file then takes token ids only, which is what winnow passes anyway.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.libraries import is_installed
from winnow.model.gguf.native import silent
from winnow.model.gguf.splits import BUILT_IN, NAMED_SPLITS, WHOLE_WORDS, Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

CANDIDATES = ("gpt-2", "qwen2", "smollm", "smaug-bpe", "gpt-4o", "superbpe", "laguna", "bloom", "default", *WHOLE_WORDS)
SAMPLES = (
    "The quick brown fox doesn't jump; it'll rest, and I've seen 12,345.67 of them (or 3 x 9 = 27).",
    'def area(width, height):\n    """Square metres."""\n    if width <= 0:\n        return None\n    return width * height\n',
    "Question: Tom has 5 apples. Tom buys 17 more.\nHow many apples does Tom have?\nAnswer:",
    "  two spaces,\ttabs\t\tand\n\n\nblank lines   \n",
    "na\u00efve caf\u00e9 \u00dcbergr\u00f6\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f999 \u20ac5",
    "HTTPServer.fooBar_baz-2 https://example.org/a?b=c&d=%20 !!! ... ###",
)


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Writes the vocabulary, padded or cut to the `rows` of the embedding; returns notes for the manifest."""
    vocabulary = vocabulary_of(tokenizer, rows)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return {"tokenizer": "none"}
    split = _named_split(tokenizer) if vocabulary.model == "gpt2" else vocabulary.pre
    has_llama_cpp = is_installed("llama_cpp")
    best_split = _best_split_by_llama_cpp if has_llama_cpp else _best_split_by_reader
    chosen, agreement = best_split(vocabulary, tokenizer, (split,) if split else CANDIDATES)
    _write(writer, vocabulary, tokenizer, chosen)
    notes = {"tokenizer": vocabulary.model, "tokenizer_agreement": agreement}
    if not has_llama_cpp:
        notes["tokenizer_agreement_with"] = "winnow's reader"
    if vocabulary.model == "gpt2":
        notes["pre_tokenizer"] = chosen if split else f"{chosen} (the nearest that llama.cpp has)"
    return notes


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary | None:
    """Returns the vocabulary of a tokenizer, or None if llama.cpp does not support its kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        return None
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    steps = [step["type"] for step in _steps(description["pre_tokenizer"])]
    if "ByteLevel" in steps:
        tokens, types = _tokens(tokenizer, description, rows, sentencepiece=False)
        return Vocabulary("gpt2", tokens, types, merges=[" ".join(m) for m in merges])
    if not model.get("byte_fallback"):
        return None
    tokens, types = _tokens(tokenizer, description, rows, sentencepiece=True)
    # SentencePiece joins the pair that makes the best token: here the token of the earliest merge
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=_adds_space(description))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any], rows: int, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Returns the texts and types of the tokens by id; ids without a token are unused. Texts are unique, else llama.cpp aborts."""
    from gguf import TokenType

    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    tokens: list[str] = []
    types: list[int] = []
    used_texts: set[str] = set()
    for index in range(rows):
        text = texts.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in texts else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        if sentencepiece and text == description["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        elif sentencepiece and _is_byte(text):
            kind = TokenType.BYTE
        elif sentencepiece and kind == TokenType.USER_DEFINED:
            text = text.replace("\u2581", " ")  # llama.cpp looks for these tokens before it escapes spaces
        while text in used_texts:
            text, kind = f"{text}#{index}", TokenType.UNUSED
        used_texts.add(text)
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _is_byte(text: str) -> bool:
    """Returns whether a token stands for a byte, such as `<0x0A>`."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns the steps of a pre-tokenizer or normalizer, in order."""
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [part])


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Returns whether the tokenizer adds a space before the text, as SentencePiece does by default."""
    steps = _steps(description["normalizer"]) + _steps(description["pre_tokenizer"])
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _named_split(tokenizer: Any) -> str | None:
    """Returns llama.cpp's name for a byte-level tokenizer's split, or None."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = []
    for step in _steps(description["pre_tokenizer"]):
        if step["type"] == "Split":
            steps.append(str(step["pattern"].get("Regex")))
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            return None
        elif step["use_regex"]:
            steps.append(BUILT_IN)
    name = NAMED_SPLITS.get(tuple(steps))
    whole_words = bool(description["model"].get("ignore_merges"))
    if name == "llama-bpe" and not whole_words:
        return "smaug-bpe"  # the same split
    return name if name is None or (name in WHOLE_WORDS) == whole_words else None


def _best_split_by_llama_cpp(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]
) -> tuple[str, float]:
    """Returns the split with which llama.cpp's ids match the tokenizer's on most samples, and the share of these."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        _write(writer, vocabulary, tokenizer, names[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        shares = {name: agreement(path, tokenizer, name) for name in names}
    best = max(names, key=lambda name: shares[name])
    return best, shares[best]


def _best_split_by_reader(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]
) -> tuple[str, float]:
    """Returns the same without llama.cpp, for the splits that winnow can read itself."""
    from winnow.model.gguf.read_vocabulary import SPLITS, build_backend

    def encode(text: str) -> list[int]:
        return list(reader.encode(text, add_special_tokens=False).ids)

    shares = {}
    for name in [name for name in names if vocabulary.model == "llama" or name in SPLITS]:
        reader = build_backend(dataclasses.replace(vocabulary, pre=name))
        shares[name] = _share_of_matches(tokenizer, [encode(text) for text in SAMPLES])
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def agreement(path: Path, tokenizer: Any, split: str | None = None) -> float:
    """Returns the share of sample texts for which llama.cpp and transformers give the same ids; `split` overrides the file's."""
    import llama_cpp

    with silent():
        overrides = {"tokenizer.ggml.pre": split} if split else None
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False, kv_overrides=overrides)
        llama_cpp_ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in SAMPLES]
        model.close()
    return _share_of_matches(tokenizer, llama_cpp_ids)


def _share_of_matches(tokenizer: Any, ids: list[list[int]]) -> float:
    expected = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in SAMPLES]
    matches = sum(bool(a == b) for a, b in zip(expected, ids, strict=True))
    return float(round(matches / len(SAMPLES), 3))


def _write(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, split: str) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < len(vocabulary.tokens):
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids  # no flag says which tokens the post-processor adds
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
