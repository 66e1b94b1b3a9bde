"""Writes files and folders whole or not at all: beside their place, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError, is_disk_full


@contextlib.contextmanager
def atomic_write(path: Path, resumable: bool = False) -> Iterator[Path]:
    """Yields a scratch path next to `path`, with the same suffix; the file or folder there becomes `path` when the block ends.

    A reader finds either the old file or the complete new one. If the block fails, what is at the scratch path is deleted.

    Args:
        resumable: whether it stays instead, for the next block that writes `path`; the caller excludes other processes.

    Raises:
        OSError: the path cannot be written, or a folder with files is there already.
    """
    scratch = path.with_name(f".{path.stem}.partial{path.suffix}") if resumable else _scratch_path(path)
    try:
        yield scratch
        scratch.replace(path)
    finally:
        if not resumable:
            _delete(scratch)


def write_first(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all, unless there is one already: of two processes at once the first one wins."""
    scratch = _scratch_path(path)
    try:
        scratch.write_text(text, encoding="utf-8")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)  # never overwrites
        except OSError:  # the file system has no links
            scratch.replace(path)
    finally:
        _delete(scratch)


def put_in_place(scratch: Path, path: Path, aside: Path) -> None:
    """Renames a file or a folder to `path`.

    A folder cannot be replaced in one step: what is at `path` is moved `aside` before and deleted after. A process that is killed
    between the two renames leaves it there.
    """
    if path.exists() and (path.is_dir() or scratch.is_dir()):
        _delete(aside)
        path.rename(aside)
    scratch.replace(path)
    _delete(aside)


def _scratch_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")


def _delete(path: Path) -> None:
    """Deletes a file or a folder; what is not there or cannot be deleted is left."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 2, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a JSON file atomically; `default` converts values that JSON lacks (without it: TypeError)."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent, default=default) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(output: Path, option: str = "output", elsewhere: str = "output= or outputs=") -> Iterator[Path]:
    """Yields a scratch folder next to `output`, which replaces `output` if the block succeeds and is deleted if it fails.

    Messages name `option` as the setting that chose the path, and `elsewhere` as the setting that chooses another one.

    Raises:
        UserError: the disk is full, or the path is not writable.
    """
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    scratch = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _sync(scratch)
        put_in_place(scratch, output, aside=output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.old")
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        remove_empty(output.parent, until=existing)
        if is_disk_full(error):
            raise UserError(
                f"{option}={output}: the disk is full; free some space or choose another place with {elsewhere}"
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(
                f"{option}={output}: not allowed to write there ({error}); choose another place with {elsewhere}"
            ) from error
        raise


def remove_empty(folder: Path, until: Path) -> None:
    """Removes a folder and its parents while they are empty; stops at `until`, which stays."""
    folder = folder.absolute()
    with contextlib.suppress(OSError):  # for example a mount point
        while folder != until and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors writes files that only their owner can read
