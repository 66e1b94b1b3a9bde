"""Training documents in batches of similar length, the same batches for the same seed, resumable at any batch.

A document is a prompt and its completion; the loss is on the completion (and on all of a document without a prompt).
Batches hold about `tokens_per_batch` tokens, so a batch of short documents has more rows. Rows start at position 0 with
`<bos>`, as they will when the model is evaluated; sorting by length within a window keeps padding to a few per cent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from transformers import PreTrainedTokenizerBase

from winnow.types import Document

IGNORED = -100  # the label that cross entropy passes over


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    answer_start: int  # the first position that the loss counts


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, end: bool = True
) -> list[Encoded]:
    """Token ids of each document, ended by `<eos>`; documents longer than `max_length` tokens are cut.

    Prompt and completion are tokenised together, as at evaluation; the loss starts at the first token of the completion.
    """
    whole = tokenizer([d.prompt + d.completion for d in documents])["input_ids"]
    prompts = tokenizer([d.prompt for d in documents])["input_ids"]
    eos = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    return [
        Encoded((ids + eos)[:max_length], len(prompt) if d.prompt else 1)
        for d, ids, prompt in zip(documents, whole, prompts, strict=True)
    ]


def batches(
    lengths: Sequence[int], tokens_per_batch: int, seed: int, epoch: int, window: int = 4096
) -> Iterator[list[int]]:
    """Indices of the documents of each batch, in an order that depends on (seed, epoch) alone."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    for start in range(0, len(order), window):
        group = sorted(order[start : start + window], key=lambda i: lengths[i])
        made: list[list[int]] = [[]]
        for i in group:  # ascending, so `i` is the longest of its batch so far
            if made[-1] and (len(made[-1]) + 1) * lengths[i] > tokens_per_batch:
                made.append([])
            made[-1].append(i)
        rng.shuffle(made)
        yield from made


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each [rows, longest]."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        labels[i, row.answer_start : len(ids)] = ids[row.answer_start :]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


class Documents(lightning.LightningDataModule):
    """Documents for training, forever (epoch after epoch), continued after a checkpoint where it left off."""

    def __init__(self, rows: Sequence[Encoded], pad: int, tokens_per_batch: int, seed: int) -> None:
        super().__init__()
        self.rows, self.pad, self.tokens_per_batch, self.seed = rows, pad, tokens_per_batch, seed
        self.done = 0  # batches handed out and trained on

    def _stream(self) -> Iterator[dict[str, torch.Tensor]]:
        lengths = [len(row.ids) for row in self.rows]
        seen, epoch = 0, 0
        while True:
            for indices in batches(lengths, self.tokens_per_batch, self.seed, epoch):
                seen += 1
                if seen > self.done:
                    yield collate([self.rows[i] for i in indices], self.pad)
            epoch += 1

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(_Stream(self._stream()), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {"batches": trainer.global_step * trainer.accumulate_grad_batches if trainer else self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["batches"]


class _Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items
