"""Loads documents for training and calibration by the name of their source, and refuses test items of benchmarks.

| `calibration.source` | documents |
|---|---|
| `auto` | the default for the model: `nano` for the embedded model, a general corpus of the hub for all others |
| `nano` | an endless stream about the embedded model's world |
| a `.jsonl`, `.json` or `.txt` file | its rows, or its paragraphs |
| a benchmark, e.g. `gsm8k` | its training split with the benchmark's prompts: from `calibration.data_dir`, else from the hub |
| `wikitext` | the articles of its training split, or of its validation split if `calibration.data_dir` has only that |
| `hub:owner/name` | a data set of the hub; `calibration.subset` and `calibration.split` choose from it |

A data set of the hub is downloaded once and stays in the hub's cache. With `calibration.streaming=true` only the rows that are
read are downloaded, each time anew. `winnow.data.document_rows` lists the forms of a row of a file or of the hub.
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
from winnow.core.text_files import KINDS, is_readable, is_rows_file, read_rows, read_text
from winnow.core.types import Calibration, Chat, Document
from winnow.data.document_rows import parse_row, refuse_test_items

HUB = "hub:"
AUTO = "auto"
GENERAL = "hub:NeelNanda/pile-10k"  # 10,000 documents of all kinds, the default of quantization libraries
CHARACTERS = 4  # per token, about: articles are cut into documents of `max_length` tokens
SHUFFLE_BUFFER = 10_000  # rows in the shuffle buffer of a stream


def default_source(target: str, path: str | None) -> str:
    """Returns the default source of a model: `nano` for models with the embedded model's vocabulary, else a general corpus.

    Args:
        target: the function that loads the model, as `model._target_` names it.
        path: the model's folder, file or hub id.
    """
    from winnow.nano.embedded import WEIGHTS

    if target.startswith("winnow.nano."):
        return "nano"
    embedded, model = (_vocabulary(folder / "tokenizer.json") for folder in (WEIGHTS, Path(path or ".")))
    return "nano" if embedded == model else GENERAL


def _vocabulary(tokenizer: Path) -> Any:
    try:
        return json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_source(calibration: Calibration) -> None:
    """Raises UserError if the source does not exist."""
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
    """Returns a hash of the source's local files, since their data may change; None for a source without local files."""
    from winnow.core.hashes import sha256_of_files
    from winnow.data.task_spec import Spec

    source = calibration.source
    if source in _benchmarks():
        specs = [Spec.read(name, dict(values)) for name, values in _benchmarks()[source].items()]
        files = [path for spec in specs for path in spec.files(calibration.data_dir)]
    else:
        files = [Path(source)] if Path(source).is_file() else []
    return sha256_of_files(files) if files else None


def documents(calibration: Calibration, count: int, seed: int) -> list[Document | Chat]:
    """Returns `count` documents of the source, sampled at random with `seed`; all documents if the source has fewer.

    Raises:
        UserError: the source does not exist or is empty, or a row has no text or is a benchmark's test item.
    """
    check_source(calibration)
    source = calibration.source
    if source == "nano":
        from winnow.nano.items import TRAIN_SEED, training_items

        return [Document(i.prompt, i.completion) for i in itertools.islice(training_items(TRAIN_SEED + seed), count)]
    if source.startswith(HUB):
        sampled = _from_hub(calibration, count, seed)
    else:
        candidates = list(_from_benchmark(calibration) if source in _benchmarks() else _from_file(source))
        sampled = random.Random(seed).sample(candidates, min(count, len(candidates)))
    if not sampled:
        raise UserError(f"calibration.source={source} is empty")
    return sampled


def _from_file(source: str) -> Iterator[Document | Chat]:
    path = Path(source)
    try:
        if is_rows_file(path):
            for where, row in read_rows(path):
                document = parse_row(row, where)
                if document != Document("", ""):
                    yield document
            return
        for number, paragraph in enumerate(read_text(path).split("\n\n"), 1):
            if paragraph.strip():
                yield parse_row({"text": paragraph.strip()}, f"{source}, paragraph {number}")
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith("calibration.") else f"calibration.source={message}") from error


def _from_hub(calibration: Calibration, count: int, seed: int) -> list[Document | Chat]:
    """Samples `count` rows: from all rows of a downloaded data set, from a shuffle buffer of a streamed one."""
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
                numbered: Iterator[tuple[int, Any]] = enumerate(itertools.islice(shuffled, count))
            else:
                chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
                numbered = ((number, rows[number]) for number in chosen)
            return [parse_row(row, f"{source}, row {number + 1}") for number, row in numbered]
    except StopIteration:  # raised by datasets for a file without rows
        return []
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # the hub's own errors are among them
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"calibration.source={source} cannot be read ({lines[0]}); {_suggestion(calibration)}"
        ) from error


def _suggestion(calibration: Calibration) -> str:
    """Suggests a source that replaces an unreachable data set of the hub, such as local files if there are any."""
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
    """Yields the training split of a benchmark, with the prompts that its test items have."""
    from winnow.data.task_spec import Spec
    from winnow.data.tasks import load, quiet

    source = calibration.source
    is_empty = True
    for name, values in _benchmarks()[source].items():
        with quiet():
            tasks, _ = load(Spec.read(name, dict(values)), calibration.data_dir, 0)
            for loaded in tasks:
                task = loaded.task
                for number, doc in enumerate(_training_items(task), 1):
                    is_empty = False
                    refuse_test_items(doc, f"{source}, row {number}")
                    yield from _item_documents(task, doc, calibration.max_length)
    if is_empty:
        raise UserError(
            f"calibration.source={source}: that benchmark has no training split here; take gsm8k, wikitext, or a file"
        )


def _training_items(task: Any) -> Any:
    """Returns the training split of a task, else its validation split if the test split is scored."""
    if task.has_training_docs():
        return task.training_docs()
    return task.validation_docs() if task.has_validation_docs() and task.has_test_docs() else []


def _item_documents(task: Any, doc: Mapping[str, Any], max_length: int) -> Iterator[Document]:
    """Yields the task's prompt and right answer for an item; a text gives pieces of about `max_length` tokens."""
    answer, delimiter = task.doc_to_target(doc), task.get_config("target_delimiter") or ""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        yield from (Document("", piece) for piece in _split_text(answer, CHARACTERS * max_length))
        return
    prompt = task.doc_to_text(doc)
    answer = answer[0] if isinstance(answer, list) else answer
    if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input:  # the choices are contexts of one continuation
        prompt = task.doc_to_choice(doc)[prompt]
    elif task.OUTPUT_TYPE == "multiple_choice" and isinstance(answer, int):
        answer = task.doc_to_choice(doc)[answer]
    yield Document(prompt, f"{delimiter}{answer}")


def _split_text(text: str, size: int) -> Iterator[str]:
    """Splits the text at white space into pieces of at most `size` characters; a longer word is split, too."""
    for piece in re.finditer(rf"\S(?:.{{0,{size - 1}}}(?=\s|\Z)|.{{{size - 1}}})", text, re.DOTALL):
        yield piece.group().rstrip()


@functools.cache
def _benchmarks() -> Mapping[str, Mapping[str, Any]]:
    """Returns the tasks of each benchmark that has tasks of its own, by the name of its option."""
    import yaml

    from winnow.core.cli import CONF

    benchmarks = {}
    for path in sorted((CONF / "benchmark").glob("*.yaml")):
        tasks = yaml.safe_load(path.read_text(encoding="utf-8")).get("tasks")
        if tasks and path.stem != "nano":
            benchmarks[path.stem] = tasks
    return benchmarks
