"""Tokenizers in GGUF files: llama.cpp gives texts the ids that transformers does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

import gguf as library

from winnow.model.gguf import vocabulary as tokenizer
from winnow.nano.items import held_out_text


def byte_level(*steps: Any, whole_words: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on a few texts, that splits them by `steps`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([item.completion for item in held_out_text(50)] + 20 * list(tokenizer.SAMPLES), trainer)
    made.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("steps", "name"), tokenizer.NAMED_SPLITS.items(), ids=tokenizer.NAMED_SPLITS.values())
def test_ids_of_byte_level_tokenizers_agree(steps: tuple[str, ...], name: str, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    built = {
        "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [built.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    if "byte-level" not in steps:
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    ours = byte_level(*parts, whole_words=name in tokenizer.WHOLE_WORDS)
    notes = tokenizer.write_vocabulary(library.GGUFWriter(tmp_path / "v.gguf", "llama"), ours, len(ours) + 10)
    assert notes == {"tokenizer": "gpt2", "tokenizer_agreement": 1.0, "pre_tokenizer": name}


@pytest.mark.parametrize("space_first", [True, False])
def test_ids_of_sentencepiece_tokenizers_agree(space_first: bool, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([item.completion for item in held_out_text(200)] + 20 * list(tokenizer.SAMPLES)),
        model_writer=file,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = generate_merges(vocabulary, {piece: pieces.get_score(i) for piece, i in vocabulary.items()})
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("\u2581")] if space_first else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    ours = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    notes = tokenizer.write_vocabulary(library.GGUFWriter(tmp_path / "v.gguf", "llama"), ours, len(ours) + 3)
    assert notes == {"tokenizer": "llama", "tokenizer_agreement": 1.0}
