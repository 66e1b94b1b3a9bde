"""Parses rows of files and data sets into documents, and refuses test items of benchmarks.

A row has one of these forms:

| fields | document |
|---|---|
| `messages`: a list of `role` and `content` | a chat |
| `conversations`: a list of `from` and `value` (ShareGPT) | a chat |
| `instruction`, `output`, and perhaps `input` | a chat of one question and one answer |
| `text` or `content` | a text |
| `prompt` and `completion`, or `question` and `answer` | a prompt and a completion; the loss is on the completion |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import strings_in
from winnow.core.types import Chat, Document

TEXT_FIELDS = ("text", "content")
PAIRS = (("prompt", "completion"), ("question", "answer"))
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_row(row: Any, where: str) -> Document | Chat:
    """Returns the document of a row.

    Raises:
        UserError: the row holds no document, or it is a test item.
    """
    if not isinstance(row, Mapping):
        raise UserError(f'calibration.source={where} is no JSON object with fields, as {{"text": "..."}}')
    refuse_test_items(row, where)
    for field, form in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        if row.get(field) is not None:
            return _parse_chat(row[field], field, form, where)
    if row.get("instruction") is not None and row.get("output") is not None:
        instruction = "\n\n".join(
            _string_field(row, field, where) for field in ("instruction", "input") if row.get(field)
        )
        answer = _string_field(row, "output", where)
        return Chat(({"role": "user", "content": instruction}, {"role": "assistant", "content": answer}))
    for field in TEXT_FIELDS:
        if field in row:
            return Document("", _string_field(row, field, where))
    for prompt_field, completion_field in PAIRS:
        if prompt_field in row and completion_field in row:
            prompt, completion = _string_field(row, prompt_field, where), _string_field(row, completion_field, where)
            if prompt_field == "question":
                return Document(f"Question: {prompt}\nAnswer:", f" {completion}")
            return Document(prompt, completion)
    raise UserError(
        f"calibration.source={where}: no text in it; it has the fields {', '.join(map(str, row))}, "
        f"wanted: text, messages, prompt and completion, question and answer, or instruction and output"
    )


def _string_field(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"calibration.source={where}: its field {field} is no text but {type(row[field]).__name__}")
    return str(row[field])


def _parse_chat(messages: Any, field: str, form: tuple[str, str], where: str) -> Chat:
    """Returns a conversation; `form` gives the keys of the role and the content in its messages."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError(f"calibration.source={where}: {field} is no list of messages with {form[0]} and {form[1]}")
    turns = []
    for number, message in enumerate(messages, 1):
        for key in form:
            if not isinstance(message.get(key), str):
                raise UserError(f"calibration.source={where}: message {number} of {field} has no {key}")
        role, content = (message[key] for key in form)
        if field == "conversations":
            if role not in SHAREGPT:
                raise UserError(
                    f"calibration.source={where}: message {number} is from {role}; known are {', '.join(SHAREGPT)}"
                )
            role = SHAREGPT[role]
        turns.append({"role": role, "content": content})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(
            f"calibration.source={where}: no message of {field} is the assistant's, so nothing can be learned"
        )
    return Chat(tuple(turns))


def refuse_test_items(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a text of the row is a test item of a benchmark."""
    from winnow.data.contamination import benchmark_of

    for text in strings_in(row):
        benchmark = benchmark_of(text)
        if benchmark is not None:
            raise UserError(
                f"calibration.source={where} is a test item of {benchmark}, on which nothing may be trained or calibrated; "
                f"remove it, or take a training split"
            )
