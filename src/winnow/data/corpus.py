"""Documents to train and calibrate on, by the name of their source. Never a benchmark's test items: these are refused.

| `calibration.source` | documents |
|---|---|
| `auto` | what suits the model: `nano` for the embedded one, a general corpus of the hub for all others |
| `nano` | the embedded model's world, an endless stream |
| a `.jsonl`, `.json` or `.txt` file | its rows, or its paragraphs |
| a benchmark, e.g. `gsm8k` | its training split, as the benchmark words it: from `calibration.data_dir`, else from the hub |
| `wikitext` | the articles of its training split, or of its validation split where `calibration.data_dir` has that only |
| `hub:owner/name` | a data set of the hub; `calibration.subset` and `calibration.split` choose from it |

A data set of the hub is downloaded once and kept in the hub's cache; with `calibration.streaming=true` only the rows that are
read come over the network, each time. A row of a file or of the hub is one of

| its fields | document |
|---|---|
| `messages`: a list of `role` and `content` | a chat |
| `conversations`: a list of `from` and `value` (ShareGPT) | a chat |
| `instruction`, `output`, and perhaps `input` | a chat of one question and one answer |
| `text` or `content` | a text |
| `prompt` and `completion`, or `question` and `answer` | a prompt, and a completion that the loss is on |
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import KINDS, holds_rows, is_readable, rows_of, strings_in, text_of
from winnow.core.types import Calibration, Chat, Document

TEXT_FIELDS = ("text", "content")
PAIRS = (("prompt", "completion"), ("question", "answer"))
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
HUB = "hub:"
AUTO = "auto"
GENERAL = "hub:NeelNanda/pile-10k"  # 10,000 documents of all kinds, what quantization libraries calibrate on by default
CHARACTERS = 4  # that a token has, about: articles are cut into documents of `max_length` tokens
SHUFFLE_BUFFER = 10_000  # rows of a stream that are mixed


def suited(target: str, path: str | None) -> str:
    """The source that suits a model: the embedded models' own for those that know its words only, a general one for all others.

    Args:
        target: what makes the model, as `model._target_` names it.
        path: its folder, file or hub id.
    """
    from winnow.nano.embedded import WEIGHTS

    if target.startswith("winnow.nano."):
        return "nano"
    mine, other = (_vocabulary(folder / "tokenizer.json") for folder in (WEIGHTS, Path(path or ".")))
    return "nano" if mine == other else GENERAL


def _vocabulary(tokenizer: Path) -> Any:
    try:
        return json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_source(calibration: Calibration) -> None:
    """Raises UserError if there is no such source."""
    source = calibration.source
    if source == "nano" or source.startswith(HUB) or source in _benchmarks():
        return
    path = Path(source)
    if not is_readable(path):
        raise UserError(
            f"calibration.source={source}: no such file; give `nano`, the path of {KINDS}, a benchmark with "
            f"a training split (gsm8k, wikitext), or hub:owner/name for a data set of the hub"
        )


def content(calibration: Calibration) -> str | None:
    """What local files of the source hold, as a hash: data may change under their names. None for what does not lie in files."""
    from winnow.core.files import sha256_of
    from winnow.data.task_spec import Spec

    source = calibration.source
    if source in _benchmarks():
        specs = [Spec.read(name, dict(values)) for name, values in _benchmarks()[source].items()]
        files = [path for spec in specs for path in spec.files(calibration.data_dir)]
    else:
        files = [Path(source)] if Path(source).is_file() else []
    return sha256_of(files) if files else None


def documents(calibration: Calibration, count: int, seed: int) -> list[Document | Chat]:
    """`count` documents of the source, drawn at random by `seed`; all of them where there are fewer.

    Raises:
        UserError: no such source, an empty one, a row without text, or a row that is a benchmark's test item.
    """
    check_source(calibration)
    source = calibration.source
    if source == "nano":
        from winnow.nano.items import TRAIN_SEED, training_items

        return [Document(i.prompt, i.completion) for i in itertools.islice(training_items(TRAIN_SEED + seed), count)]
    if source.startswith(HUB):
        found = _from_hub(calibration, count, seed)
    else:
        whole = list(_from_benchmark(calibration) if source in _benchmarks() else _from_file(source))
        found = random.Random(seed).sample(whole, min(count, len(whole)))
    if not found:
        raise UserError(f"calibration.source={source} is empty")
    return found


def _from_file(source: str) -> Iterator[Document | Chat]:
    path = Path(source)
    try:
        if holds_rows(path):
            for where, row in rows_of(path):
                document = _checked(row, where)
                if document != Document("", ""):
                    yield document
            return
        for number, paragraph in enumerate(text_of(path).split("\n\n"), 1):
            if paragraph.strip():
                yield _checked({"text": paragraph.strip()}, f"{source}, paragraph {number}")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("calibration.") else f"calibration.source={text}") from error


def _from_hub(calibration: Calibration, count: int, seed: int) -> list[Document | Chat]:
    """`count` rows at random: of all rows of a data set on disk, of a window that moves over a streamed one."""
    import datasets

    from winnow.model.hub import offline_if_unreachable

    source, split = calibration.source, calibration.split
    try:
        with offline_if_unreachable():
            rows: Any = datasets.load_dataset(
                source.removeprefix(HUB), calibration.subset, split=split, streaming=calibration.streaming
            )
            if calibration.streaming:
                shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
                drawn: Iterator[tuple[int, Any]] = enumerate(itertools.islice(shuffled, count))
            else:
                chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
                drawn = ((number, rows[number]) for number in chosen)
            return [_checked(row, f"{source}, row {number + 1}") for number, row in drawn]
    except StopIteration:  # what datasets says of a file without rows
        return []
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # the hub's own errors are among them
        told = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"calibration.source={source} cannot be read ({told[0]}); {_way_out(calibration)}") from error


def _way_out(calibration: Calibration) -> str:
    """What to do where a data set of the hub is out of reach: the local files that could serve, if there are any."""
    local = [
        f"calibration.source={name} (of {path})"
        for name, tasks in _benchmarks().items()
        for values in tasks.values()
        for split, file in (values.get("data") or {}).items()
        if (split == "train" or (split == "validation" and "test" in values["data"]))
        and calibration.data_dir
        and (path := Path(calibration.data_dir) / file).is_file()
    ]
    if local:
        return f"here is {' or '.join(local)}"
    if calibration.source == GENERAL:
        return (
            f"that is the default for models other than the embedded one; without the hub set calibration.source to {KINDS}, or to "
            f"gsm8k or wikitext with calibration.data_dir=FOLDER"
        )
    return f"check its name, calibration.subset and calibration.split={calibration.split}, or give a file"


def _from_benchmark(calibration: Calibration) -> Iterator[Document | Chat]:
    """The training split of a benchmark, worded as its items will be when it is scored."""
    from winnow.data.task_spec import Spec
    from winnow.data.tasks import load, quiet

    source = calibration.source
    found = False
    for name, values in _benchmarks()[source].items():
        with quiet():
            tasks, _ = load(Spec.read(name, dict(values)), calibration.data_dir, 0)
            for loaded in tasks:
                task = loaded.task
                for number, doc in enumerate(_unscored(task), 1):
                    found = True
                    _refuse_test_items(doc, f"{source}, row {number}")
                    yield from _worded(task, doc, calibration.max_length)
    if not found:
        raise UserError(
            f"calibration.source={source}: that benchmark has no training split here; take gsm8k, wikitext, or a file"
        )


def _unscored(task: Any) -> Any:
    """The training split of a task; without one its validation split, if it is another that is scored."""
    if task.has_training_docs():
        return task.training_docs()
    return task.validation_docs() if task.has_validation_docs() and task.has_test_docs() else []


def _worded(task: Any, doc: Mapping[str, Any], max_length: int) -> Iterator[Document]:
    """An item with its right answer, as the task words it; of a text pieces of about `max_length` tokens."""
    answer, delimiter = task.doc_to_target(doc), task.get_config("target_delimiter") or ""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        yield from (Document("", piece) for piece in _pieces(answer, CHARACTERS * max_length))
        return
    asked = task.doc_to_text(doc)
    answer = answer[0] if isinstance(answer, list) else answer
    if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input:  # the choices come before the same continuation
        asked = task.doc_to_choice(doc)[asked]
    elif task.OUTPUT_TYPE == "multiple_choice" and isinstance(answer, int):
        answer = task.doc_to_choice(doc)[answer]
    yield Document(asked, f"{delimiter}{answer}")


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` characters, cut at white space; within a word only if it is longer than that."""
    for piece in re.finditer(rf"\S(?:.{{0,{size - 1}}}(?=\s|\Z)|.{{{size - 1}}})", text, re.DOTALL):
        yield piece.group().rstrip()


@functools.cache
def _benchmarks() -> Mapping[str, Mapping[str, Any]]:
    """The tasks of each benchmark that is one by itself, by the name of its option."""
    from omegaconf import OmegaConf

    from winnow.core.cli import CONF

    found = {}
    for path in sorted((CONF / "benchmark").glob("*.yaml")):
        tasks = OmegaConf.to_container(OmegaConf.load(path)).get("tasks")  # type: ignore[union-attr]
        if tasks and path.stem != "nano":
            found[path.stem] = tasks
    return found


def _checked(row: Any, where: str) -> Document | Chat:
    """The document that a row is.

    Raises:
        UserError: there is none in it, or it is a test item.
    """
    if not isinstance(row, Mapping):
        raise UserError(f'calibration.source={where} is no JSON object with fields, as {{"text": "..."}}')
    _refuse_test_items(row, where)
    for field, form in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        if row.get(field) is not None:
            return _chat(row[field], field, form, where)
    if row.get("instruction") is not None and row.get("output") is not None:
        asked = "\n\n".join(_string(row, field, where) for field in ("instruction", "input") if row.get(field))
        answer = _string(row, "output", where)
        return Chat(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))
    for field in TEXT_FIELDS:
        if field in row:
            return Document("", _string(row, field, where))
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            asked, answer = _string(row, prompt, where), _string(row, completion, where)
            if prompt == "question":
                return Document(f"Question: {asked}\nAnswer:", f" {answer}")
            return Document(asked, answer)
    raise UserError(
        f"calibration.source={where}: no text in it; it has the fields {', '.join(map(str, row))}, "
        f"wanted: text, messages, prompt and completion, question and answer, or instruction and output"
    )


def _string(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"calibration.source={where}: its field {field} is no text but {type(row[field]).__name__}")
    return str(row[field])


def _chat(messages: Any, field: str, form: tuple[str, str], where: str) -> Chat:
    """A conversation, `form` being what its messages call the role and the content."""
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


def _refuse_test_items(row: Mapping[str, Any], where: str) -> None:
    from winnow.data.contamination import benchmark_of

    for text in strings_in(row):
        benchmark = benchmark_of(text)
        if benchmark is not None:
            raise UserError(
                f"calibration.source={where} is a test item of {benchmark}, on which nothing may be trained or calibrated; "
                f"remove it, or take a training split"
            )
