"""How a benchmark is described in `conf/benchmark/*.yaml`: which lm-eval tasks it is, and which of their figures counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.text_files import KINDS, is_readable

MEANS = ("items", "subtasks")
PERPLEXITY = "perplexity"  # lm-eval's metric of this name gives an item's log-likelihood, and its figure is exp(-mean)


@dataclass(frozen=True)
class Spec:
    """One benchmark: its lm-eval tasks, the metric that is its score, and where its items lie on disk.

    Attributes:
        name: of the benchmark, and of its figures.
        folder: of lm-eval task YAMLs: absolute, in the `winnow` package, or among lm-eval's own tasks.
        task: a task's name in that folder, or a pattern with `*`: the tasks that match are the benchmark's subtasks.
        metric: of the task, which scores an item; None for text, which is scored by perplexity.
        filter: which of the task's answer extractions counts; None if it has one only.
        further: further metrics of the same task, each of them a figure `<name>_<metric>`.
        also: further tasks over the same items, by the suffix of the figure that each adds: `{mc2: truthfulqa_mc2}`.
        data: `{split: file}` below `data_dir`; `{subtask}` stands for the subtask, `*` for any file.
        local_task: a task of `folder` or of `winnow` to use instead, where the items come from `data_dir`.
        mean: the score is the mean over `items`, or over `subtasks` (each of them weighs the same).
        num_fewshot: exemplars before each question; None leaves the task's own number.
        window: of text: the most tokens that are predicted together; None takes what the model can hold.
        words: of text: how many words of each item are scored, from its beginning; None scores all.
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
        for key, least in (("window", 2), ("words", 1)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(
                    f"benchmark.tasks.{self.name}.{key}={value} is not a whole number of at least {least}, or null"
                )
            if value is not None and self.metric is not None:
                raise UserError(f"benchmark.tasks.{self.name}.{key} is for text, which has metric: null; leave it out")
        if self.mean not in MEANS:
            raise UserError(f"benchmark.tasks.{self.name}.mean={self.mean} is not known; it is {' or '.join(MEANS)}")

    @classmethod
    def read(cls, name: str, values: Mapping[str, Any]) -> Spec:
        """The benchmark that a node of `benchmark.tasks` describes.

        Raises:
            UserError: a key that there is not, or one that is missing.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"name"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"benchmark.tasks.{name}.{unknown[0]}: there is no such key; there are {sorted(known)}")
        for key in ("folder", "task"):
            if not values.get(key):
                raise UserError(f"benchmark.tasks.{name}.{key} is missing: the lm-eval task that scores {name}")
        return cls(name, **values)

    def scores(self) -> tuple[str, ...]:
        """The names of its figures in which more is better."""
        if self.metric is None:
            return ()
        suffixes = [*(metric for metric in self.further if metric != PERPLEXITY), *self.also]
        return (self.name, *(f"{self.name}_{suffix}" for suffix in suffixes))

    def files(self, data_dir: str | None) -> list[Path]:
        """All files of this benchmark that are below `data_dir`."""
        patterns = self.data.values() if data_dir is not None else ()
        return [path for pattern in patterns for path in find(str(data_dir), pattern.replace("{subtask}", "*"))]

    def check_files(self, data_dir: str) -> None:
        """That the files of this benchmark are below `data_dir`.

        Raises:
            UserError: which names the first one that is not.
        """
        for pattern in self.data.values():
            if not find(data_dir, pattern.replace("{subtask}", "*")):
                raise UserError(missing(self.name, data_dir, pattern))


def find(data_dir: str, pattern: str) -> list[Path]:
    """The files that `pattern` means below `data_dir`; for `*` that is `data_dir` itself where it is a file."""
    root = Path(data_dir).expanduser().resolve()
    if root.is_file():
        return [root] if pattern == "*" else []
    if "*" not in pattern:
        return [root / pattern] if (root / pattern).is_file() else []
    return sorted(path for path in root.glob(pattern) if is_readable(path))


def missing(name: str, data_dir: str, pattern: str) -> str:
    """The message for a file that is not there."""
    wanted = KINDS if pattern == "*" else pattern
    return f"benchmark.data_dir={data_dir} has no {wanted}, which benchmark {name} reads"
