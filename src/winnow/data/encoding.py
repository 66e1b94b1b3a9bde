"""Documents as token ids, and these as the rows that a model is given.

Imports no Lightning: whoever calibrates or compares models encodes texts, and trains nothing.
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

IGNORED = -100  # the target that losses pass over


@dataclass(frozen=True)
class Encoded:
    """Token ids of a document.

    Attributes:
        answers: the half-open spans of positions whose tokens the loss counts.
        cut: tokens beyond `max_length`, which were left out.
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
    """Token ids of each document, ended by `<eos>`; documents longer than `max_length` tokens are cut.

    Prompt and completion are tokenised together, as at evaluation; the loss starts at the first token of the completion. A chat
    goes through the tokenizer's template, and the loss is on what the assistant says.

    Raises:
        UserError: a chat, and the tokenizer has no template, or one that refuses it.
    """
    plain = [d for d in documents if isinstance(d, Document)]
    whole = iter(tokenizer([d.prompt + d.completion for d in plain])["input_ids"] if plain else [])
    prompts = iter(tokenizer([d.prompt for d in plain])["input_ids"] if plain else [])
    eos = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    made = []
    for document in documents:
        if isinstance(document, Document):
            ids, prompt = next(whole) + eos, next(prompts)
            answers = [(len(prompt) if document.prompt else 1, len(ids))]
        else:
            ids, answers = _templated(document, tokenizer)
        kept = [(start, min(stop, max_length)) for start, stop in answers if start < min(stop, max_length)]
        made.append(Encoded(ids[:max_length], tuple(kept), max(0, len(ids) - max_length)))
    return [row for row in made if row.ids]  # a text without words is nothing for some tokenizers


def _templated(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a chat, and the spans of what the assistant says.

    An answer begins where the conversation before it, with the template's opening of an answer, ends. Some templates word an
    answer otherwise once others follow it (they leave its thoughts out); such an answer is read and not learned.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "calibration.source holds chats, and the model's tokenizer has no chat template; "
            "give rows with prompt and completion, or take an instruction-tuned model"
        )
    messages = list(chat.messages)

    def templated(upto: int, opening: bool = False) -> list[int]:
        found: Any = tokenizer.apply_chat_template(
            messages[:upto], tokenize=True, add_generation_prompt=opening, return_dict=True
        )
        return list(found["input_ids"])

    spans = []
    try:
        ids = templated(len(messages))
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = templated(turn, opening=True), templated(turn + 1)
                start, stop = _shared(ids, before), _shared(ids, after)
                # a last token may have grown together with the first of what follows
                if start >= len(before) - 1 and stop >= len(after) - 1:
                    spans.append((start, stop))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"calibration.source holds a chat ({roles}) that the model's chat template refuses ({error}); remove it"
        ) from error
    return ids, spans


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def collate(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Documents as one row.

    `input_ids`, `position_ids` (which start at 0 in each document) and `targets` (the id that follows, `IGNORED` where none is
    asked for), each [1, T]; `cu_seqlens` [documents + 1], the boundaries; `longest`, the tokens of the longest document.
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
    """The same for models whose attention cannot be told where documents begin: a row each, `attention_mask` beside it."""
    longest = max(len(row.ids) for row in rows)
    shape = (len(rows), longest)
    input_ids, targets = torch.full(shape, pad), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        one = collate([row])
        length = len(row.ids)
        input_ids[i, :length], targets[i, :length], mask[i, :length] = one["input_ids"][0], one["targets"][0], 1
    return {"input_ids": input_ids, "targets": targets, "attention_mask": mask}


def moved(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A batch, its tensors on the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
