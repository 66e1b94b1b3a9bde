"""lm-eval's own task objects, made from its installed YAMLs over local files or over the hub's data sets.

lm-eval indexes all of its tasks in 14 s; a folder of one benchmark takes milliseconds, so that is all that is read. Local
items come under an unchanged task through a YAML that includes it and replaces its data set.
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

from winnow.core.errors import UserError, behind
from winnow.data.task_spec import Spec, find, missing
from winnow.model.hub import offline_if_unreachable

PACKAGE = Path(__file__).resolve().parents[1]
OWN_TASKS = PACKAGE / "benchmark" / "tasks"
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split", "dev": "fewshot_split"}


@dataclass(frozen=True)
class Loaded:
    """A task ready to be asked: `task` is lm-eval's object, `subtask` its name within the benchmark."""

    task: Any
    subtask: str


def load(
    spec: Spec, data_dir: str | None = None, num_fewshot: int | None = None
) -> tuple[list[Loaded], dict[str, Any]]:
    """The tasks of a benchmark, and those of its further figures by suffix.

    Args:
        data_dir: where `spec.data` is looked for; None takes the task's own data set.
        num_fewshot: exemplars before each question; None is the benchmark's own number.

    Raises:
        UserError: there is no such task, a file is missing, or the hub is out of reach.
    """
    local = data_dir is not None and bool(spec.data)
    folder, pattern = folder_of(spec.folder), spec.task
    if local and spec.local_task:
        pattern = spec.local_task
        folder = folder if list(folder.glob(f"{pattern}.yaml")) else OWN_TASKS
    shots = num_fewshot if num_fewshot is not None else spec.num_fewshot
    main = [_load(spec, folder, name, data_dir, shots) for name in _names(spec, folder, pattern)]
    also = {s: _load(spec, folder, name, data_dir, shots).task for s, name in spec.also.items()}
    return main, also


def folder_of(name: str) -> Path:
    """The folder of task YAMLs that `name` means: absolute, in the `winnow` package, or among lm-eval's tasks."""
    roots = [Path("/"), PACKAGE]
    found = importlib.util.find_spec("lm_eval")  # located without importing it
    if found is not None and found.submodule_search_locations:
        roots.append(Path(found.submodule_search_locations[0]) / "tasks")
    for root in roots:
        if (root != Path("/") or Path(name).is_absolute()) and (root / name).is_dir():
            return root / name
    raise UserError(f"{name} is not a folder of lm-eval tasks: neither in winnow nor in the lm-eval that is installed")


def _names(spec: Spec, folder: Path, pattern: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    single = set(manager.all_subtasks)  # leaves out groups and tags, which patterns match, too
    names = [name for name in manager.match_tasks([pattern]) if name in single]
    if not names:
        raise UserError(f"benchmark.tasks.{spec.name}.task={pattern}: {folder} has no such task")
    return sorted(names)


def _load(spec: Spec, folder: Path, name: str, data_dir: str | None, num_fewshot: int | None) -> Loaded:
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
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # a task that says 0 has its exemplars built in
        task.set_config("num_fewshot", num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return Loaded(task, subtask)


def _build(manager: Any, name: str) -> Any:
    return manager.load([name])["tasks"][name]


def _files(
    spec: Spec, yaml_path: Path, config: dict[str, Any], subtask: str, data_dir: str | None
) -> dict[str, list[str]]:
    """Absolute paths by split: below `data_dir`, or beside a task whose own data are local; none for one of the hub."""
    files: dict[str, list[str]] = {}
    if data_dir is not None and spec.data:
        for split, pattern in spec.data.items():
            wanted = pattern.replace("{subtask}", subtask)
            found = find(data_dir, wanted)
            if not found:
                raise UserError(missing(spec.name, data_dir, wanted))
            files[split] = [str(path) for path in found]
    elif config.get("dataset_path") == "json":
        for split, path in config["dataset_kwargs"]["data_files"].items():
            files[split] = [str((yaml_path.parent / path).resolve())]
    return files


def _yaml(source: Path, name: str, config: dict[str, Any], files: dict[str, list[str]]) -> str:
    """A task YAML that includes `source` and reads `files`; splits without a file are there no more."""
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
    """The task over the hub's data set, as downloaded or as cached.

    Raises:
        UserError: it is not cached, and cannot be downloaded.
    """
    try:
        with offline_if_unreachable():
            return _build(manager, name)
    except Exception as error:
        if not _is_unreachable(error):
            raise
        wanted = ", ".join(spec.data.values()).replace("*", ".txt, .jsonl or .json files") or "its items"
        raise UserError(
            f"benchmark {spec.name} is not on disk and there is no network; give benchmark.data_dir=FOLDER with {wanted}"
        ) from None


def _is_unreachable(error: BaseException) -> bool:
    """Whether a failed download is behind it: the hub's libraries wrap that in exceptions of several kinds."""
    for cause in behind(error):
        module = type(cause).__module__.split(".")[0]
        if isinstance(cause, ConnectionError | TimeoutError) or module in ("httpx", "httpcore", "requests"):
            return True
        if module in ("huggingface_hub", "datasets") and not isinstance(cause, ValueError | KeyError):
            return True
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without remarks and progress bars of the libraries below; loggers, warnings and environment are afterwards as they were."""
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
