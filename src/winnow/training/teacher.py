"""Loads and checks a teacher, a frozen model on the student's device and in its own precision, from which a student learns.

The objective holds the teacher, so that it is not part of the LightningModule, and is not trained, sharded or checkpointed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from winnow.core.errors import UserError
from winnow.model.lm import LM
from winnow.model.spec import context_of
from winnow.training.student import Student


def open_teacher(path: str, like: LM, option: str) -> LM:
    """Returns the teacher in a folder or on the hub with the loading options of `like`; its weights are not in memory yet.

    Raises:
        UserError: there is no such model; the message names `option`.
    """
    from winnow.model.pretrained import pretrained

    try:
        return pretrained(path, **{**dataclasses.asdict(like.loading), "device": "cpu"})
    except UserError as error:
        raise _name_option(option, error) from error


def check_pair(teacher: LM, student: LM, option: str) -> None:
    """Raises UserError if the two models have different vocabularies. Reads configurations and tokenizers, no weights."""

    try:
        config, vocabulary = teacher.config().get_text_config(), teacher.tokenizer.get_vocab()
    except UserError as error:
        raise _name_option(option, error) from error
    teacher_size, student_size = config.vocab_size, student.model.config.get_text_config().vocab_size
    if teacher_size != student_size or vocabulary != student.tokenizer.get_vocab():
        sizes = f"{teacher_size:,} and {student_size:,} tokens"
        if teacher_size == student_size:
            sizes = f"{student_size:,} tokens each, but others"
        raise UserError(
            f"{option}: teacher {teacher.path} and student {student.name} have different vocabularies ({sizes}), so their "
            f"distributions cannot be compared; take a teacher of the student's own family, or recover with method=[lora]"
        )


def check_widths(teacher: LM, student_config: Any, option: str) -> None:
    """Raises UserError if the hidden states of the two models have different widths."""

    teacher_width = teacher.config().get_text_config().hidden_size
    student_width = student_config.get_text_config().hidden_size
    if teacher_width != student_width:
        raise UserError(
            f"{option} compares hidden states, which need one width: the teacher's is {teacher_width}, "
            f"the student's {student_width}; set it to 0, or keep the hidden size"
        )


def context_length(teacher: LM) -> int | None:
    """Returns the context length of a teacher; None if its attention sets no limit."""

    return context_of(teacher.config())


def load_frozen(teacher: LM, device: str) -> Student:
    """Loads the teacher to `device`, frozen and in evaluation mode."""
    model: Any = teacher.model.to(device)  # type: ignore[arg-type]
    return Student(model.requires_grad_(False).eval())


def _name_option(option: str, error: UserError) -> UserError:
    """Returns the error with `option` in place of `model.path` in its message."""
    text = str(error)
    return UserError(text.replace("model.path=", f"{option}=", 1)) if "model.path=" in text else error
