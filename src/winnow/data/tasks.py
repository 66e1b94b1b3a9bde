"""Builds lm-eval's task objects from its installed YAMLs, over local files or the hub's data sets.

lm-eval needs 14 s to index all of its tasks and milliseconds for the folder of one benchmark, so only that folder is indexed.
For local items, a generated YAML includes the unchanged task and replaces its data set.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError, cause_chain
from winnow.data.task_spec import Spec, find_files, missing_file_message
from winnow.model.hub import offline_if_unreachable

PACKAGE = Path(__file__).resolve().parents[1]
OWN_TASKS = PACKAGE / "benchmark" / "tasks"
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split", "dev": "fewshot_split"}


@dataclass(frozen=True)
class LoadedTask:
    """A loaded task: `task` is lm-eval's object, `subtask` its name within the benchmark."""

    task: Any
    subtask: str


def load(
    spec: Spec, data_dir: str | None = None, num_fewshot: int | None = None
) -> tuple[list[LoadedTask], dict[str, Any]]:
    """Loads the tasks of a benchmark, and the tasks of its further figures by suffix.

    Args:
        data_dir: the folder that holds the files of `spec.data`; None uses the task's own data set.
        num_fewshot: exemplars before each question; None is the benchmark's own number.

    Raises:
        UserError: the task does not exist, a file is missing, or the hub is out of reach.
    """
    local = data_dir is not None and bool(spec.data)
    folder, pattern = folder_of(spec.folder), spec.task
    if local and spec.local_task:
        pattern = spec.local_task
        folder = folder if list(folder.glob(f"{pattern}.yaml")) else OWN_TASKS
    shots = num_fewshot if num_fewshot is not None else spec.num_fewshot
    main = [_load(spec, folder, name, data_dir, shots) for name in _task_names(spec, folder, pattern)]
    extra_tasks = {s: _load(spec, folder, name, data_dir, shots).task for s, name in spec.also.items()}
    return main, extra_tasks


def folder_of(name: str) -> Path:
    """Returns the folder of task YAMLs called `name`: absolute, in the `winnow` package, or among lm-eval's tasks.

    Raises:
        UserError: there is no such folder.
    """
    roots = [Path("/"), PACKAGE]
    package = importlib.util.find_spec("lm_eval")  # located without an import
    if package is not None and package.submodule_search_locations:
        roots.append(Path(package.submodule_search_locations[0]) / "tasks")
    for root in roots:
        if (root != Path("/") or Path(name).is_absolute()) and (root / name).is_dir():
            return root / name
    raise UserError(f"{name} is not a folder of lm-eval tasks: neither in winnow nor in the lm-eval that is installed")


def _task_names(spec: Spec, folder: Path, pattern: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    single = set(manager.all_subtasks)  # without groups and tags, which patterns also match
    names = [name for name in manager.match_tasks([pattern]) if name in single]
    if not names:
        raise UserError(f"benchmark.tasks.{spec.name}.task={pattern}: {folder} has no such task")
    return sorted(names)


def _load(spec: Spec, folder: Path, name: str, data_dir: str | None, num_fewshot: int | None) -> LoadedTask:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    entry = manager.task_index.get(name)
    if entry is None:
        raise UserError(f"benchmark.tasks.{spec.name}: {folder} has no task {name}")
    config: dict[str, Any] = entry.cfg or {}
    subtask = str(config.get("dataset_name") or name)
    files = _files(spec, Path(entry.yaml_path), config, subtask, data_dir)
    if files:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "task.yaml").write_text(_yaml(Path(entry.yaml_path), name, config, files), encoding="utf-8")
            task = _build(TaskManager(include_path=scratch, include_defaults=False), name)
    else:
        task = from_hub(spec, manager, name)
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # a task with 0 has exemplars in its prompt
        task.set_config("num_fewshot", num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return LoadedTask(task, subtask)


def _build(manager: Any, name: str) -> Any:
    return manager.load([name])["tasks"][name]


def _files(
    spec: Spec, yaml_path: Path, config: dict[str, Any], subtask: str, data_dir: str | None
) -> dict[str, list[str]]:
    """Returns absolute paths by split: below `data_dir`, or next to a task with local data; none for a data set of the hub."""
    files: dict[str, list[str]] = {}
    if data_dir is not None and spec.data:
        for split, pattern in spec.data.items():
            subtask_pattern = pattern.replace("{subtask}", subtask)
            paths = find_files(data_dir, subtask_pattern)
            if not paths:
                raise UserError(missing_file_message(spec.name, data_dir, subtask_pattern))
            files[split] = [str(path) for path in paths]
    elif config.get("dataset_path") == "json":
        for split, path in config["dataset_kwargs"]["data_files"].items():
            files[split] = [str((yaml_path.parent / path).resolve())]
    return files


def _yaml(source: Path, name: str, config: dict[str, Any], files: dict[str, list[str]]) -> str:
    """Returns a task YAML that includes `source`, reads `files`, and removes the splits without a file."""
    lines = [
        f"include: {json.dumps(str(source))}",
        f"task: {name}",
        "custom_dataset: !function winnow.data.local_items.read",
        f"dataset_kwargs: {json.dumps({'files': files})}",
    ]
    for key in sorted(set(SPLITS.values())):
        if config.get(key) is not None and config[key] not in files:
            lines.append(f"{key}: null")
    return "\n".join(lines) + "\n"


def from_hub(spec: Spec, manager: Any, name: str) -> Any:
    """Loads the task with the hub's data set, from the hub or its cache.

    Raises:
        UserError: the data set is not cached and cannot be downloaded.
    """
    try:
        with offline_if_unreachable():
            return _build(manager, name)
    except Exception as error:
        if not _is_unreachable(error):
            raise
        file_names = ", ".join(spec.data.values()).replace("*", ".txt, .jsonl or .json files") or "its items"
        raise UserError(
            f"benchmark {spec.name} is not on disk and there is no network; give benchmark.data_dir=FOLDER with {file_names}"
        ) from None


def _is_unreachable(error: BaseException) -> bool:
    """Returns whether a failed download caused the error: the hub's libraries wrap it in exceptions of several types."""
    for cause in cause_chain(error):
        module = type(cause).__module__.split(".")[0]
        if isinstance(cause, ConnectionError | TimeoutError) or module in ("httpx", "httpcore", "requests"):
            return True
        if module in ("huggingface_hub", "datasets") and not isinstance(cause, ValueError | KeyError):
            return True
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences logs, warnings and progress bars of libraries, and restores loggers, warnings and environment afterwards."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    environment, bars_shown = dict(os.environ), not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_shown:
                datasets.enable_progress_bars()
            for key in set(os.environ) - set(environment):
                del os.environ[key]
            os.environ.update(environment)
