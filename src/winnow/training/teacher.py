"""A teacher: a frozen model that a student learns from, beside the student on the device, in its own precision.

It is held by the objective and no part of the LightningModule: neither trained nor spread over devices nor checkpointed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from winnow.core.errors import UserError
from winnow.model.lm import LM
from winnow.model.spec import context_of
from winnow.training.student import Student


def teacher_at(path: str, like: LM, option: str) -> LM:
    """The teacher in a folder or on the hub, not in memory yet; it is loaded as `like` was.

    Raises:
        UserError: there is no such model; the message names `option`.
    """
    from winnow.model.pretrained import pretrained

    try:
        return pretrained(path, **{**dataclasses.asdict(like.loading), "device": "cpu"})
    except UserError as error:
        raise _about(option, error) from error


def check_pair(teacher: LM, student: LM, option: str) -> None:
    """Raises UserError if the two do not read and write the same tokens. Reads configurations and tokenizers, no weights."""

    try:
        config, vocabulary = teacher.config().get_text_config(), teacher.tokenizer.get_vocab()
    except UserError as error:
        raise _about(option, error) from error
    theirs, ours = config.vocab_size, student.model.config.get_text_config().vocab_size
    if theirs != ours or vocabulary != student.tokenizer.get_vocab():
        sizes = f"{theirs:,} and {ours:,} tokens" if theirs != ours else f"{ours:,} tokens each, but others"
        raise UserError(
            f"{option}: teacher {teacher.path} and student {student.name} have different vocabularies ({sizes}), so their "
            f"distributions cannot be compared; take a teacher of the student's own family, or recover with method=[lora]"
        )


def check_widths(teacher: LM, student_config: Any, option: str) -> None:
    """Raises UserError if hidden states of the two cannot be compared."""

    theirs, ours = teacher.config().get_text_config().hidden_size, student_config.get_text_config().hidden_size
    if theirs != ours:
        raise UserError(
            f"{option} compares hidden states, which need one width: the teacher's is {theirs}, the student's {ours}; "
            f"set it to 0, or keep the hidden size"
        )


def context(teacher: LM) -> int | None:
    """The longest sequence that a teacher reads."""

    return context_of(teacher.config())


def frozen(teacher: LM, device: str) -> Student:
    """The teacher in memory, on `device`, ready to be asked."""
    model: Any = teacher.model.to(device)  # type: ignore[arg-type]
    return Student(model.requires_grad_(False).eval())


def _about(option: str, error: UserError) -> UserError:
    text = str(error)
    return UserError(text.replace("model.path=", f"{option}=", 1)) if "model.path=" in text else error
