"""Reads the tokenizer of a GGUF file as a transformers tokenizer with llama.cpp's token ids, the inverse of `vocabulary`.

Byte-level BPE (`gpt2`) has merges and the name of a pre-tokenizer split. An unknown name is refused, because another split would
silently give other ids. SentencePiece (`llama`) has scores. Its merges are all splits of a piece into two known pieces, in the
order of the pieces' scores: SentencePiece joins the neighbours that make the best piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from winnow.model.gguf.file import File
from winnow.model.gguf.splits import NAMED_SPLITS, WHOLE_WORDS, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPLITS = {name: steps for steps, name in NAMED_SPLITS.items()}
SPLITS["smaug-bpe"] = SPLITS["llama-bpe"]
_SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "llama4": "gpt-4o"}
_NFC_SPLITS = ("qwen2",)  # tokenizers that normalise text to NFC, which llama.cpp does not do
_BOS_SPLITS = ("llama-bpe", "tekken")  # tokenizers that add a BOS token by default
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # gguf.TokenType


def read_tokenizer(file: File) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a file, with its special tokens and chat template.

    Raises:
        UserError: the tokenizer's kind or split is unknown, or a part is missing.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = vocabulary_of_file(file)
    backend = build_backend(vocabulary)
    special_tokens = {name: _special_token(file, vocabulary, gguf) for name, gguf in _SPECIAL_TOKENS.items()}
    adds_bos = vocabulary.model == "llama" or vocabulary.pre in _BOS_SPLITS
    prefix_tokens = _added_token(file, "add_bos_token", adds_bos, special_tokens["bos_token"])
    suffix_tokens = _added_token(file, "add_eos_token", False, special_tokens["eos_token"])
    if prefix_tokens or suffix_tokens:
        added_tokens = dict.fromkeys([*prefix_tokens, *suffix_tokens])
        backend.post_processor = processors.TemplateProcessing(
            single=[*prefix_tokens, "$A", *suffix_tokens],
            pair=[*prefix_tokens, "$A", *suffix_tokens, *prefix_tokens, "$B:1", *suffix_tokens],
            special_tokens=[(token, backend.token_to_id(token)) for token in added_tokens],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=int(file.required(f"{file.architecture}.context_length")),
        **{name: token for name, token in special_tokens.items() if token is not None},
    )
    template = file.keys.get("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def end_ids(file: File) -> list[int]:
    """Returns the ids that end an answer: those of the text's end, and of a turn's end if the chat template has one."""
    tokens, types = file.required("tokenizer.ggml.tokens"), file.required("tokenizer.ggml.token_type")
    ids = [file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    template = file.keys.get("tokenizer.chat_template") or ""
    turn_ends = [text for text in ENDS_OF_TURN if text in template]
    ids += [index for index, text in enumerate(tokens) if text in turn_ends and types[index] == _CONTROL]
    return list(dict.fromkeys(index for index in ids if index is not None))


def vocabulary_of_file(file: File) -> Vocabulary:
    """Returns the vocabulary of a file.

    Raises:
        UserError: see `read_tokenizer`.
    """
    model = file.required("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise file.error(
            f"its tokenizer is of the kind {model}, and winnow reads gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    tokens, types = file.required("tokenizer.ggml.tokens"), file.required("tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise file.error("its tokenizer.ggml.tokens and token_type do not go together")
    merges, scores = file.keys.get("tokenizer.ggml.merges"), file.keys.get("tokenizer.ggml.scores")
    pre = file.keys.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        if not merges and (not scores or len(scores) != len(tokens)):
            raise file.error("its tokenizer has neither merges nor a score for each token (tokenizer.ggml.scores)")
        space_prefix = file.keys.get("tokenizer.ggml.add_space_prefix", True)
        return Vocabulary("llama", tokens, types, scores, merges or None, space_prefix=space_prefix)
    if not merges:
        raise file.error("it lacks the merges of its tokenizer (tokenizer.ggml.merges)")
    pre = _SAME_AS.get(pre, pre)
    if pre not in SPLITS:
        raise file.error(
            f"its tokenizer splits text by tokenizer.ggml.pre={pre}, and winnow knows {', '.join([*SPLITS, *_SAME_AS])}",
            instead="give the model as a Hugging Face folder or hub id",
        )
    return Vocabulary("gpt2", tokens, types, merges=merges, pre=pre)


def build_backend(vocabulary: Vocabulary) -> Tokenizer:
    """Builds the tokenizer that turns text into ids, without the tokens added before and after a text."""
    from tokenizers import AddedToken, Tokenizer

    kinds = vocabulary.types
    # without the padding rows of the embedding
    ids = {
        text: index
        for index, text in enumerate(vocabulary.tokens)
        if kinds[index] in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE) or not text.startswith(f"[PAD{index}]")
    }
    parts = _byte_level(vocabulary, ids) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary, ids)
    tokenizer = Tokenizer(parts.pop("model"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        texts = [text for text, index in ids.items() if kinds[index] == kind]
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    return tokenizer


def _byte_level(vocabulary: Vocabulary, ids: dict[str, int]) -> dict[str, Any]:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    merges = _pairs(vocabulary.merges or [])
    steps: list[Any] = []
    for step in SPLITS[vocabulary.pre]:
        if step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "byte-level":
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
    built_in = "byte-level" in SPLITS[vocabulary.pre]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in))
    parts = {
        "model": models.BPE(ids, merges, ignore_merges=vocabulary.pre in WHOLE_WORDS),
        "pre_tokenizer": pre_tokenizers.Sequence(steps),
        "decoder": decoders.ByteLevel(),
    }
    return parts | ({"normalizer": normalizers.NFC()} if vocabulary.pre in _NFC_SPLITS else {})


def _sentencepiece(vocabulary: Vocabulary, ids: dict[str, int]) -> dict[str, Any]:
    from tokenizers import decoders, models, normalizers

    kinds = vocabulary.types
    if vocabulary.merges is not None:
        merges = _pairs(vocabulary.merges)
    else:
        pieces = {t: i for t, i in ids.items() if kinds[i] not in (_CONTROL, _UNKNOWN, _BYTE)}
        merges = merges_of(pieces, vocabulary.scores or [])
    unknown_token = next((text for text, index in ids.items() if kinds[index] == _UNKNOWN), None)
    first_steps = [normalizers.Prepend("\u2581")] if vocabulary.space_prefix else []
    last_steps = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    return {
        "model": models.BPE(ids, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=_BYTE in kinds),
        "normalizer": normalizers.Sequence([*first_steps, normalizers.Replace(" ", "\u2581")]),
        "decoder": decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last_steps]
        ),
    }


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def merges_of(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges of a SentencePiece vocabulary: all splits of a piece into two pieces, best piece first.

    The splits of one piece are ordered by the length of their first part, longest first, as in transformers' conversion.
    """
    splits = [
        (-scores[index], -cut, (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [merge for _, _, merge in sorted(splits)]


def _special_token(file: File, vocabulary: Vocabulary, name: str) -> str | None:
    index: int | None = file.keys.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if index >= len(vocabulary.tokens):
        raise file.error(f"tokenizer.ggml.{name}_token_id={index} is none of its {len(vocabulary.tokens):,} tokens")
    return vocabulary.tokens[index]


def _added_token(file: File, flag: str, default: bool, token: str | None) -> list[str]:
    """Returns a list with the token that the tokenizer adds before or after a text, or an empty list."""
    is_set = file.keys.get(f"tokenizer.ggml.{flag}")
    if is_set and token is None:
        raise file.error(f"tokenizer.ggml.{flag} is true, and it names no such token")
    return [token] if token is not None and (default if is_set is None else is_set) else []
