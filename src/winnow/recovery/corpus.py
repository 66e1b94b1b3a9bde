"""Documents to train and calibrate on, by the name of their source. Never a benchmark's test items: these are refused.

| `calibration.source` | documents |
|---|---|
| `nano` | the embedded model's world, an endless stream |
| a `.jsonl` or `.txt` file | its rows, or its paragraphs |
| a benchmark, e.g. `gsm8k` | its training split, as the benchmark words it: from `calibration.data_dir`, else from the hub |
| `hub:owner/name` | a data set of the hub, streamed; `calibration.subset` and `calibration.split` choose from it |
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from winnow.types import Calibration, Document, UserError

TEXT_FIELDS = ("text", "content")
PAIRS = (("prompt", "completion"), ("question", "answer"))
HUB = "hub:"
SHUFFLE_BUFFER = 10_000  # rows of a stream that are mixed


def check_source(calibration: Calibration) -> None:
    """Raises UserError if there is no such source."""
    source = calibration.source
    if source == "nano" or source.startswith(HUB) or source in _benchmarks():
        return
    path = Path(source)
    if not path.is_file() or path.suffix not in (".jsonl", ".txt"):
        raise UserError(
            f"calibration.source={source}: no such file; give `nano`, the path of a .jsonl or .txt file, a benchmark with "
            f"a training split (gsm8k), or hub:owner/name for a data set of the hub"
        )


def documents(calibration: Calibration, count: int, seed: int) -> list[Document]:
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
        found = list(itertools.islice(_from_hub(calibration, seed), count))
    else:
        whole = list(_from_benchmark(calibration) if source in _benchmarks() else _from_file(source))
        found = random.Random(seed).sample(whole, min(count, len(whole)))
    if not found:
        raise UserError(f"calibration.source={source} is empty")
    return found


def _from_file(source: str) -> Iterator[Document]:
    path = Path(source)
    with path.open(encoding="utf-8") as lines:
        if path.suffix == ".txt":
            for number, paragraph in enumerate(lines.read().split("\n\n"), 1):
                if paragraph.strip():
                    yield _checked({"text": paragraph.strip()}, f"{source}, paragraph {number}")
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{source}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"calibration.source={where} is not JSON ({error})") from error
                yield _checked(row, where)


def _from_hub(calibration: Calibration, seed: int) -> Iterator[Document]:
    import datasets

    from winnow.model.hub import offline_if_unreachable

    source, split = calibration.source, calibration.split
    try:
        with offline_if_unreachable():
            stream = datasets.load_dataset(
                source.removeprefix(HUB), calibration.subset, split=split, streaming=True, trust_remote_code=False
            )
            for number, row in enumerate(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), 1):
                yield _checked(row, f"{source}, row {number}")
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise UserError(
            f"calibration.source={source} cannot be read ({str(error).splitlines()[0]}); check its name, calibration.subset "
            f"and calibration.split={split}, or give a file"
        ) from error


def _from_benchmark(calibration: Calibration) -> Iterator[Document]:
    """The training split of a benchmark, worded as its items will be when it is scored."""
    from winnow.benchmark.harness import quiet
    from winnow.benchmark.spec import Spec
    from winnow.benchmark.tasks import load

    source = calibration.source
    found = False
    for name, values in _benchmarks()[source].items():
        with quiet():
            tasks, _ = load(Spec.read(name, dict(values)), calibration.data_dir, 0)
            for loaded in tasks:
                task = loaded.task
                for number, doc in enumerate(task.training_docs() if task.has_training_docs() else [], 1):
                    found = True
                    _refuse_test_items(doc, f"{source}, row {number}")
                    delimiter = task.get_config("target_delimiter") or ""
                    yield Document(task.doc_to_text(doc), f"{delimiter}{task.doc_to_target(doc)}")
    if not found:
        raise UserError(
            f"calibration.source={source}: that benchmark has no training split here; take gsm8k, or a file"
        )


def _benchmarks() -> Mapping[str, Mapping[str, Any]]:
    """The tasks of each benchmark that is one by itself, by the name of its option."""
    from omegaconf import OmegaConf

    from winnow.cli import CONF

    found = {}
    for path in sorted((CONF / "benchmark").glob("*.yaml")):
        tasks = OmegaConf.to_container(OmegaConf.load(path)).get("tasks")  # type: ignore[union-attr]
        if tasks and path.stem != "nano":
            found[path.stem] = tasks
    return found


def _checked(row: Mapping[str, Any], where: str) -> Document:
    _refuse_test_items(row, where)
    for field in TEXT_FIELDS:
        if field in row:
            return Document("", row[field])
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            if prompt == "question":
                return Document(f"Question: {row[prompt]}\nAnswer:", f" {row[completion]}")
            return Document(row[prompt], row[completion])
    raise UserError(
        f"calibration.source={where}: no text in it; it has the fields {', '.join(row)}, "
        f"wanted: text, or prompt and completion, or question and answer"
    )


def _refuse_test_items(row: Mapping[str, Any], where: str) -> None:
    from winnow.benchmark.held_out import benchmark_of

    for value in row.values():
        benchmark = benchmark_of(value) if isinstance(value, str) else None
        if benchmark is not None:
            raise UserError(
                f"calibration.source={where} is a test item of {benchmark}, on which nothing may be trained or calibrated; "
                f"remove it, or take a training split"
            )
