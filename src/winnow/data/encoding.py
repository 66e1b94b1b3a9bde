"""Encodes documents as token ids, and collates them into the batches of a model.

The module imports no Lightning, since calibration and comparison encode texts without training.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from winnow.core.errors import UserError
from winnow.core.types import Chat, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # target id that losses ignore


@dataclass(frozen=True)
class Encoded:
    """Token ids of a document.

    Attributes:
        answers: half-open spans of the positions whose tokens the loss counts.
        cut: number of tokens beyond `max_length`, which were cut off.
    """

    ids: list[int]
    answers: tuple[tuple[int, int], ...]
    cut: int = 0

    @property
    def answer_start(self) -> int:
        return self.answers[0][0] if self.answers else len(self.ids)

    @property
    def target_count(self) -> int:
        return sum(end - max(1, start) for start, end in self.answers if end > max(1, start))


def encode(
    documents: Sequence[Document | Chat], tokenizer: PreTrainedTokenizerBase, max_length: int, end: bool = True
) -> list[Encoded]:
    """Returns the token ids of each document, with `<eos>` at the end if `end`, cut to `max_length` tokens.

    Prompt and completion are tokenized together, as in evaluation; the loss starts at the first token of the completion. A chat
    is formatted by the tokenizer's chat template, and the loss is on the assistant's messages.

    Raises:
        UserError: a document is a chat, and the tokenizer has no template or its template refuses the chat.
    """
    plain = [d for d in documents if isinstance(d, Document)]
    full_ids = iter(tokenizer([d.prompt + d.completion for d in plain])["input_ids"] if plain else [])
    prompt_ids = iter(tokenizer([d.prompt for d in plain])["input_ids"] if plain else [])
    eos = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    rows = []
    for document in documents:
        if isinstance(document, Document):
            ids, prompt = next(full_ids) + eos, next(prompt_ids)
            answers = [(len(prompt) if document.prompt else 1, len(ids))]
        else:
            ids, answers = _encode_chat(document, tokenizer)
        spans = [(start, min(stop, max_length)) for start, stop in answers if start < min(stop, max_length)]
        rows.append(Encoded(ids[:max_length], tuple(spans), max(0, len(ids) - max_length)))
    return [row for row in rows if row.ids]  # some tokenizers give no ids for a text without words


def _encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the token ids of a chat, and the spans of the assistant's messages.

    An answer begins where the conversation before it ends, with the template's generation prompt. Some templates change an answer
    once messages follow it (they remove its thoughts); the model reads such an answer, and the loss ignores it.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "calibration.source holds chats, and the model's tokenizer has no chat template; "
            "give rows with prompt and completion, or take an instruction-tuned model"
        )
    messages = list(chat.messages)

    def apply_template(count: int, generation_prompt: bool = False) -> list[int]:
        encoding: Any = tokenizer.apply_chat_template(
            messages[:count], tokenize=True, add_generation_prompt=generation_prompt, return_dict=True
        )
        return list(encoding["input_ids"])

    spans = []
    try:
        ids = apply_template(len(messages))
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = apply_template(turn, generation_prompt=True), apply_template(turn + 1)
                start, stop = _common_prefix_length(ids, before), _common_prefix_length(ids, after)
                # the tokenizer may merge the last token with the first token that follows
                if start >= len(before) - 1 and stop >= len(after) - 1:
                    spans.append((start, stop))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"calibration.source holds a chat ({roles}) that the model's chat template refuses ({error}); remove it"
        ) from error
    return ids, spans


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of ids that two sequences share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def collate(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Packs documents into one row.

    Returns `input_ids`, `position_ids` (which start at 0 in each document) and `targets` (the next id, `IGNORED` where the loss
    counts none), each [1, T]; `cu_seqlens` [documents + 1], the boundaries; `longest`, the tokens of the longest document.
    """
    ids = [i for row in rows for i in row.ids]
    targets = torch.full((len(ids),), IGNORED)
    bounds = [0, *itertools.accumulate(len(row.ids) for row in rows)]
    for row, offset in zip(rows, bounds, strict=False):
        for start, end in row.answers:
            start = max(1, start)
            targets[offset + start - 1 : offset + end - 1] = torch.tensor(row.ids[start:end])
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
    return {
        "input_ids": torch.tensor(ids)[None],
        "position_ids": positions[None],
        "targets": targets[None],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "longest": max(len(row.ids) for row in rows),
    }


def collate_padded(rows: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Collates documents into padded rows with an `attention_mask`, for models whose attention cannot separate packed documents."""
    longest = max(len(row.ids) for row in rows)
    shape = (len(rows), longest)
    input_ids, targets = torch.full(shape, pad), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        packed = collate([row])
        length = len(row.ids)
        input_ids[i, :length], targets[i, :length], mask[i, :length] = packed["input_ids"][0], packed["targets"][0], 1
    return {"input_ids": input_ids, "targets": targets, "attention_mask": mask}


def to_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Returns the batch with its tensors on the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
