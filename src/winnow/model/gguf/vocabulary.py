"""A tokenizer of transformers as a GGUF vocabulary.

llama.cpp knows two kinds that matter here: byte-level BPE (`gpt2`: tokens, merges, and the *name* of a way to split text, for
a file cannot hold the regular expression itself), and SentencePiece (`llama`: tokens with scores). A split that has no name is
written as the one whose ids agree best with ours on sample texts. What is neither kind is written without texts (`none`): the
file then takes token ids only, which is how winnow feeds it anyway.
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


def add_to(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Writes the vocabulary, padded or cut to the `rows` of the embedding; returns what to note of it in the manifest."""
    vocabulary = vocabulary_of(tokenizer, rows)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return {"tokenizer": "none"}
    split = _named_split(tokenizer) if vocabulary.model == "gpt2" else vocabulary.pre
    by_llama_cpp = is_installed("llama_cpp")
    choose = _best_split if by_llama_cpp else _best_split_as_read
    chosen, agreement = choose(vocabulary, tokenizer, (split,) if split else CANDIDATES)
    _write(writer, vocabulary, tokenizer, chosen)
    notes = {"tokenizer": vocabulary.model, "tokenizer_agreement": agreement}
    if not by_llama_cpp:
        notes["tokenizer_agreement_with"] = "winnow's reader"
    if vocabulary.model == "gpt2":
        notes["pre_tokenizer"] = chosen if split else f"{chosen} (the nearest that llama.cpp has)"
    return notes


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary | None:
    """The vocabulary of a tokenizer, or None where llama.cpp has no such kind."""
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
    # SentencePiece joins the pair that makes the best token; here: the token that the earliest merge makes
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=_adds_space(description))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any], rows: int, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Texts and types of the tokens by id; ids without one are unused. No text comes twice: llama.cpp would abort."""
    from gguf import TokenType

    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    tokens: list[str] = []
    types: list[int] = []
    seen: set[str] = set()
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
            text = text.replace("\u2581", " ")  # llama.cpp looks for these before it escapes spaces
        while text in seen:
            text, kind = f"{text}#{index}", TokenType.UNUSED
        seen.add(text)
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, one after the other."""
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [part])


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, as SentencePiece does unless told not to."""
    steps = _steps(description["normalizer"]) + _steps(description["pre_tokenizer"])
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _named_split(tokenizer: Any) -> str | None:
    """llama.cpp's name of how a byte-level tokenizer splits text, or None."""
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


def _best_split(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]
) -> tuple[str, float]:
    """The name under which llama.cpp's ids agree with ours on most of the samples, and their share."""
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


def _best_split_as_read(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]
) -> tuple[str, float]:
    """The same without llama.cpp, of the names that winnow can read itself."""
    from winnow.model.gguf.read_vocabulary import SPLITS, backend

    def ids(text: str) -> list[int]:
        return list(read.encode(text, add_special_tokens=False).ids)

    shares = {}
    for name in [name for name in names if vocabulary.model == "llama" or name in SPLITS]:
        read = backend(dataclasses.replace(vocabulary, pre=name))
        shares[name] = _share(tokenizer, [ids(text) for text in SAMPLES])
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def agreement(path: Path, tokenizer: Any, split: str | None = None) -> float:
    """The share of sample texts that llama.cpp and transformers turn into the same ids; `split` overrides the file's."""
    import llama_cpp

    with silent():
        overrides = {"tokenizer.ggml.pre": split} if split else None
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False, kv_overrides=overrides)
        theirs = [model.tokenize(text.encode(), add_bos=False, special=False) for text in SAMPLES]
        model.close()
    return _share(tokenizer, theirs)


def _share(tokenizer: Any, theirs: list[list[int]]) -> float:
    ours = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in SAMPLES]
    equal = sum(bool(a == b) for a, b in zip(ours, theirs, strict=True))
    return float(round(equal / len(SAMPLES), 3))


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
    ids = tokenizer("a").input_ids  # what the post-processor puts around a text is nowhere stated as a flag
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
