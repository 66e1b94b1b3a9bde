"""Files that are there whole or not at all, whatever happens while they are written; and what files are known by."""

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

SMALL_BYTES = 16 * 2**20  # read each time that it is asked
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SETTLED_S = 2.0  # more than the tick of any file system's clock


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, with the same suffix; what was written there becomes `path` at the end.

    A reader finds what was there before, or all that is new. If the writing fails, nothing of it is left.
    """
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 2, default: Callable[[Any], Any] | None = None) -> None:
    """Whole or not at all; `default` turns what JSON has no word for into something that it has (without it: TypeError)."""
    with whole(path) as scratch:
        scratch.write_text(json.dumps(content, indent=indent, default=default) + "\n", encoding="utf-8")


def cache_root() -> Path:
    """The folder of what winnow keeps for all its commands of a user."""
    given = os.environ.get("WINNOW_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "winnow"


def sha256_of(paths: Iterable[Path]) -> str:
    """Of several files together, by name and content, in any order."""
    return hashlib.sha256(json.dumps(sorted((path.name, sha256(path)) for path in paths)).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content. A large file is read once for each of its versions, by whichever process comes first.

    A version is known by name, inode, size, time of change and a few samples: copies of another model may have the size and the
    time of the first. What was changed a moment ago may change again within one tick of the clock, and is not kept.
    """
    found = path.stat()
    if found.st_size < SMALL_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    version = hashlib.sha256(f"{path.name}\n{found.st_ino}\n{found.st_size}\n{found.st_mtime_ns}\n".encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(found.st_size * sample // _SAMPLES)
            version.update(file.read(_SAMPLE_BYTES))
        note = cache_root() / "hashes" / version.hexdigest()[:32]
        with contextlib.suppress(OSError, ValueError):
            kept = note.read_text(encoding="utf-8").strip()
            if re.fullmatch("[0-9a-f]{64}", kept):
                return kept
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - found.st_mtime > _SETTLED_S and path.stat().st_mtime_ns == found.st_mtime_ns:
        with contextlib.suppress(OSError):  # it is read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            with whole(note) as scratch:
                scratch.write_text(f"{digest}\n", encoding="utf-8")
    return digest


@contextlib.contextmanager
def whole_folder(output: Path, option: str = "output", elsewhere: str = "output= or outputs=") -> Iterator[Path]:
    """A scratch folder beside `output` that takes its name when the block ends well, and vanishes when it does not.

    `option` and `elsewhere` say in messages what put `output` there, and what puts it in another place.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    scratch = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _sync(scratch)
        old = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.old"
        if output.exists():
            output.rename(old)
        scratch.rename(output)
        shutil.rmtree(old, ignore_errors=True)
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
    """Removes a folder and its parents as long as they are empty, up to and without `until`."""
    folder = folder.absolute()
    with contextlib.suppress(OSError):  # a mount point, say
        while folder != until and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors makes files that only their owner can read
