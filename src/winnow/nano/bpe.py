"""Trains the embedded model's tokenizer: byte-level BPE over the nano world, with single digits and `<bos>` before each text.

python -m winnow.nano.bpe FOLDER      # trains the tokenizer (seconds) and saves it
"""

from __future__ import annotations

import itertools
import sys

from transformers import PreTrainedTokenizerFast

from winnow.nano.items import training_items

VOCABULARY = 1024
TRAINING_ITEMS = 20_000


def train_tokenizer(items: int = TRAINING_ITEMS, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on the first `items` of the training stream; its byte alphabet encodes any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|[^\S\n]+|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (item.prompt + item.completion for item in itertools.islice(training_items(), items))
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1024,
    )


if __name__ == "__main__":
    train_tokenizer().save_pretrained(sys.argv[1])
