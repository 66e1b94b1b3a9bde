"""Writes files and folders atomically, and hashes files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError, is_disk_full

SMALL_BYTES = 16 * 2**20  # files below this size are hashed anew on every call
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SETTLED_S = 2.0  # longer than the clock resolution of any file system


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a scratch path next to `path`, with the same suffix, which replaces `path` when the block ends.

    A reader finds either the old file or the complete new one. If the block fails, the scratch file is deleted.
    """
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 2, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a JSON file atomically; `default` converts values that JSON lacks (without it: TypeError)."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent, default=default) + "\n", encoding="utf-8")


def cache_root() -> Path:
    """Returns the folder of the cache that all commands of a user share."""
    configured = os.environ.get("WINNOW_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "winnow"


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Returns one SHA-256 for several files, by name and content, independent of their order."""
    return hashlib.sha256(json.dumps(sorted((path.name, sha256(path)) for path in paths)).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content; the hash of a large file is cached, for all processes.

    The cache key is made of name, inode, size, modification time and a few samples of the content, because copies of another
    model may have the same size and time. A file that was modified within the last clock tick may change again: its hash is not
    cached.
    """
    stat = path.stat()
    if stat.st_size < SMALL_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    version = hashlib.sha256(f"{path.name}\n{stat.st_ino}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(stat.st_size * sample // _SAMPLES)
            version.update(file.read(_SAMPLE_BYTES))
        cache_file = cache_root() / "hashes" / version.hexdigest()[:32]
        with contextlib.suppress(OSError, ValueError):
            cached = cache_file.read_text(encoding="utf-8").strip()
            if re.fullmatch("[0-9a-f]{64}", cached):
                return cached
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_mtime > _SETTLED_S and path.stat().st_mtime_ns == stat.st_mtime_ns:
        with contextlib.suppress(OSError):  # the file is then read again next time
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache_file) as scratch:
                scratch.write_text(f"{digest}\n", encoding="utf-8")
    return digest


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
