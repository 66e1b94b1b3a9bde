"""Writes files and folders atomically."""

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
    scratch = path.with_name(f".{path.stem}{'' if resumable else f'.{uuid.uuid4().hex[:8]}'}.partial{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        if not resumable:
            _delete(scratch)


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
        replaced = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.old"
        if output.exists():
            output.rename(replaced)
        scratch.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
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
