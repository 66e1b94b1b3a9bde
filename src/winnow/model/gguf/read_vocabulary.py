"""The tokenizer in a GGUF file as one of transformers, the inverse of `tokenizer`: ids are those that llama.cpp gives.

Byte-level BPE (`gpt2`) has merges and the name of a way to split text; a name that is not known is refused, for another split
gives other ids without a word. SentencePiece (`llama`) has scores. Its merges are all splits of a piece into two known pieces,
those of the best piece first: what SentencePiece does when it joins the neighbours that make the best piece.
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
_COMPOSING = ("qwen2",)  # these tokenizers bring text into Unicode's form NFC, which llama.cpp leaves to others
_BEGINNING = ("llama-bpe", "tekken")  # put a token before each text unless the file says otherwise
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # gguf.TokenType


def tokenizer_in(file: File) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, with its special tokens and chat template.

    Raises:
        UserError: it is of a kind or has a split that is not known, or lacks a part.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = vocabulary_in(file)
    made = backend(vocabulary)
    special = {name: _special(file, vocabulary, gguf) for name, gguf in _SPECIAL.items()}
    adds_bos = vocabulary.model == "llama" or vocabulary.pre in _BEGINNING
    before = _flagged(file, "add_bos_token", adds_bos, special["bos_token"])
    after = _flagged(file, "add_eos_token", False, special["eos_token"])
    if before or after:
        around = dict.fromkeys([*before, *after])
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, made.token_to_id(token)) for token in around],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_max_length=int(file.need(f"{file.architecture}.context_length")),
        **{name: token for name, token in special.items() if token is not None},
    )
    template = file.keys.get("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def end_ids(file: File) -> list[int]:
    """The tokens that end an answer: the end of the text, and that of a turn where the chat template has one."""
    tokens, types = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.token_type")
    found = [file.keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    template = file.keys.get("tokenizer.chat_template") or ""
    turns = [text for text in ENDS_OF_TURN if text in template]
    found += [index for index, text in enumerate(tokens) if text in turns and types[index] == _CONTROL]
    return list(dict.fromkeys(index for index in found if index is not None))


def vocabulary_in(file: File) -> Vocabulary:
    """The vocabulary as the file has it.

    Raises:
        UserError: see `tokenizer_in`.
    """
    model = file.need("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise file.refused(
            f"its tokenizer is of the kind {model}, and winnow reads gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    tokens, types = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise file.refused("its tokenizer.ggml.tokens and token_type do not go together")
    merges, scores = file.keys.get("tokenizer.ggml.merges"), file.keys.get("tokenizer.ggml.scores")
    pre = file.keys.get("tokenizer.ggml.pre", "default")
    if model == "llama":
        if not merges and (not scores or len(scores) != len(tokens)):
            raise file.refused("its tokenizer has neither merges nor a score for each token (tokenizer.ggml.scores)")
        spaced = file.keys.get("tokenizer.ggml.add_space_prefix", True)
        return Vocabulary("llama", tokens, types, scores, merges or None, space_prefix=spaced)
    if not merges:
        raise file.refused("it lacks the merges of its tokenizer (tokenizer.ggml.merges)")
    pre = _SAME_AS.get(pre, pre)
    if pre not in SPLITS:
        raise file.refused(
            f"its tokenizer splits text by tokenizer.ggml.pre={pre}, and winnow knows {', '.join([*SPLITS, *_SAME_AS])}",
            instead="give the model as a Hugging Face folder or hub id",
        )
    return Vocabulary("gpt2", tokens, types, merges=merges, pre=pre)


def backend(vocabulary: Vocabulary) -> Tokenizer:
    """What turns texts into ids, without what is put around a text."""
    from tokenizers import AddedToken, Tokenizer

    kinds = vocabulary.types
    # rows of the embedding that no token of the model has
    ids = {
        text: index
        for index, text in enumerate(vocabulary.tokens)
        if kinds[index] in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE) or not text.startswith(f"[PAD{index}]")
    }
    parts = _byte_level(vocabulary, ids) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary, ids)
    made = Tokenizer(parts.pop("model"))
    for name, part in parts.items():
        setattr(made, name, part)
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        found = [text for text, index in ids.items() if kinds[index] == kind]
        made.add_tokens([AddedToken(text, special=special, normalized=False) for text in found])
    return made


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
    return parts | ({"normalizer": normalizers.NFC()} if vocabulary.pre in _COMPOSING else {})


def _sentencepiece(vocabulary: Vocabulary, ids: dict[str, int]) -> dict[str, Any]:
    from tokenizers import decoders, models, normalizers

    kinds = vocabulary.types
    if vocabulary.merges is not None:
        merges = _pairs(vocabulary.merges)
    else:
        pieces = {t: i for t, i in ids.items() if kinds[i] not in (_CONTROL, _UNKNOWN, _BYTE)}
        merges = merges_of(pieces, vocabulary.scores or [])
    unknown = next((text for text, index in ids.items() if kinds[index] == _UNKNOWN), None)
    first = [normalizers.Prepend("\u2581")] if vocabulary.space_prefix else []
    last = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    return {
        "model": models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds),
        "normalizer": normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")]),
        "decoder": decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        ),
    }


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def merges_of(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that make a SentencePiece vocabulary: all splits of a piece into two pieces, best piece first.

    Of several splits of one piece that with the longest first part comes first, as where transformers converts such a model.
    """
    found = [
        (-scores[index], -cut, (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [merge for _, _, merge in sorted(found)]


def _special(file: File, vocabulary: Vocabulary, name: str) -> str | None:
    index: int | None = file.keys.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if index >= len(vocabulary.tokens):
        raise file.refused(f"tokenizer.ggml.{name}_token_id={index} is none of its {len(vocabulary.tokens):,} tokens")
    return vocabulary.tokens[index]


def _flagged(file: File, flag: str, default: bool, token: str | None) -> list[str]:
    """The token that is put before or after a text, if there is to be one."""
    wanted = file.keys.get(f"tokenizer.ggml.{flag}")
    if wanted and token is None:
        raise file.refused(f"tokenizer.ggml.{flag} is true, and it names no such token")
    return [token] if token is not None and (default if wanted is None else wanted) else []
