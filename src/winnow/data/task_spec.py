"""Describes a benchmark of `conf/benchmark/*.yaml`: its lm-eval tasks, its metric, and the files of its items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import KINDS, is_readable

MEANS = ("items", "subtasks")
PERPLEXITY = "perplexity"  # lm-eval's metric of this name is an item's log-likelihood; the figure is exp(-mean)


@dataclass(frozen=True)
class Spec:
    """One benchmark: its lm-eval tasks, its metric, and the files of its items.

    Attributes:
        name: the name of the benchmark, and of its figures.
        folder: the folder of lm-eval task YAMLs: absolute, in the `winnow` package, or among lm-eval's own tasks.
        task: a task's name in that folder, or a pattern with `*`: the tasks that match are the benchmark's subtasks.
        metric: the task's metric that scores an item; None for text, which is scored by perplexity.
        filter: the task's answer extraction that counts; None if it has only one.
        further: further metrics of the same task; each adds a figure `<name>_<metric>`.
        also: further tasks over the same items, by the suffix of the figure that each adds: `{mc2: truthfulqa_mc2}`.
        data: `{split: file}` below `data_dir`; `{subtask}` stands for the subtask, `*` for any file.
        local_task: the task of `folder` or of `winnow` that replaces `task` for items from `data_dir`.
        mean: whether the score is the mean over `items`, or over `subtasks` with equal weights.
        num_fewshot: exemplars before each question; None leaves the task's own number.
        window: for text: the largest number of tokens that are predicted together; None uses the model's context.
        words: for text: the number of words of each item that are scored, from its start; None scores all.
    """

    name: str
    folder: str
    task: str
    metric: str | None = "acc"
    filter: str | None = None
    further: Sequence[str] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    local_task: str | None = None
    mean: str = "items"
    num_fewshot: int | None = None
    window: int | None = None
    words: int | None = None

    def __post_init__(self) -> None:
        for key, minimum in (("window", 2), ("words", 1)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise UserError(
                    f"benchmark.tasks.{self.name}.{key}={value} is not a whole number of at least {minimum}, or null"
                )
            if value is not None and self.metric is not None:
                raise UserError(f"benchmark.tasks.{self.name}.{key} is for text, which has metric: null; leave it out")
        if self.mean not in MEANS:
            raise UserError(f"benchmark.tasks.{self.name}.mean={self.mean} is not known; it is {' or '.join(MEANS)}")

    @classmethod
    def read(cls, name: str, values: Mapping[str, Any]) -> Spec:
        """Returns the benchmark that a node of `benchmark.tasks` describes.

        Raises:
            UserError: a key is unknown or missing.
        """
        keys = {f.name for f in dataclasses.fields(cls)} - {"name"}
        unknown = sorted(set(values) - keys)
        if unknown:
            raise UserError(f"benchmark.tasks.{name}.{unknown[0]}: there is no such key; there are {sorted(keys)}")
        for key in ("folder", "task"):
            if not values.get(key):
                raise UserError(f"benchmark.tasks.{name}.{key} is missing: the lm-eval task that scores {name}")
        return cls(name, **values)

    def scores(self) -> tuple[str, ...]:
        """Returns the names of its figures in which more is better."""
        if self.metric is None:
            return ()
        suffixes = [*(metric for metric in self.further if metric != PERPLEXITY), *self.also]
        return (self.name, *(f"{self.name}_{suffix}" for suffix in suffixes))

    def files(self, data_dir: str | None) -> list[Path]:
        """Returns all files of this benchmark below `data_dir`."""
        patterns = self.data.values() if data_dir is not None else ()
        return [path for pattern in patterns for path in find_files(str(data_dir), pattern.replace("{subtask}", "*"))]

    def check_files(self, data_dir: str) -> None:
        """Checks that the files of this benchmark are below `data_dir`.

        Raises:
            UserError: a file is missing; the message names the first one.
        """
        for pattern in self.data.values():
            if not find_files(data_dir, pattern.replace("{subtask}", "*")):
                raise UserError(missing_file_message(self.name, data_dir, pattern))


def find_files(data_dir: str, pattern: str) -> list[Path]:
    """Returns the files below `data_dir` that match `pattern`; `*` also matches `data_dir` itself if it is a file."""
    root = Path(data_dir).expanduser().resolve()
    if root.is_file():
        return [root] if pattern == "*" else []
    if "*" not in pattern:
        return [root / pattern] if (root / pattern).is_file() else []
    return sorted(path for path in root.glob(pattern) if is_readable(path))


def missing_file_message(name: str, data_dir: str, pattern: str) -> str:
    """Returns the error message for a missing file."""
    file_name = KINDS if pattern == "*" else pattern
    return f"benchmark.data_dir={data_dir} has no {file_name}, which benchmark {name} reads"
