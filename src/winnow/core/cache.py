"""Caches values: entries in a folder that processes share, and the answers of a function in memory.

An entry is a file or a folder, named by the hash of its key. It is written whole or not at all, and a damaged entry counts as
missing. A caller brings the key, and functions that read and write an entry:

    cache = Cache(folder, suffix=".json", limit_bytes=10**9)
    entry = cache.entry(["latency", model.sha256()])
    figures = cache.read(entry, load)
    if figures is None:
        figures = measure(model)
        with cache.writing(entry) as scratch:
            save(figures, scratch)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from winnow.core.errors import UserError
from winnow.core.files import atomic_write

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
V = TypeVar("V")
_DAMAGE = (OSError, ValueError, KeyError, EOFError, UserError)


def cache_root() -> Path:
    """Returns the folder of the cache that all commands of a user share."""
    configured = os.environ.get("WINNOW_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "winnow"


def stored_bytes(path: Path) -> int:
    """Returns the size of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a file or a folder.

    Attributes:
        suffix: the end of the entries' names.
        limit_bytes: limit of all entries together; beyond it the least recently used ones are removed. None: no limit.
        damage: exceptions by which reading shows a damaged entry, besides those of Python's own readers and UserError.
    """

    folder: Path
    suffix: str = ""
    limit_bytes: int | None = None
    damage: tuple[type[Exception], ...] = ()

    def entry(self, key: Any, name: str = "") -> Path:
        """Returns the path of a key's entry, by the SHA-256 of the key as JSON; `name` precedes it, for people to read."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return self.folder / f"{name}{'-' if name else ''}{digest}{self.suffix}"

    def fits(self, size: int) -> bool:
        """Returns whether an entry of this many bytes is within the limit."""
        return self.limit_bytes is None or size <= self.limit_bytes

    def read(self, entry: Path, load: Callable[[Path], T | None]) -> T | None:
        """Returns `load(entry)`, or None if the entry is missing or damaged."""
        with self.reading(entry, load) as value:
            return value

    @contextlib.contextmanager
    def reading(self, entry: Path, load: Callable[[Path], T | None]) -> Iterator[T | None]:
        """Yields `load(entry)`, or None if the entry is missing or damaged; it is not removed before the block ends.

        A damaged entry is removed, so that it can be written again. If `load` returns None, the entry does not count as used.
        """
        damage: tuple[type[Exception], ...] = (*_DAMAGE, *self.damage)
        is_damaged = False
        with _locked(entry, fcntl.LOCK_SH) as is_there:
            value = None
            try:
                value = load(entry) if is_there else None
            except damage:
                is_damaged = True
            if value is not None:
                self._mark_used(entry)
                yield value
                return
        if is_damaged:
            _remove(entry)
        yield None

    @contextlib.contextmanager
    def writing(self, entry: Path, expected_bytes: int = 0, resumable: bool = False) -> Iterator[Path]:
        """Yields a scratch path with the same suffix; the file or folder that the block writes there becomes the entry.

        A file replaces the entry that is there. An entry over the limit is not stored; room for it is made before the block, as
        far as `expected_bytes` goes, and after it.

        Args:
            resumable: see `atomic_write`; only for a block inside `computing`.

        Raises:
            OSError: the disk is full, the folder cannot be written, or another process has stored the same folder first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(expected_bytes)
        with contextlib.suppress(_OverLimit), atomic_write(entry, resumable) as scratch:
            yield scratch
            size = stored_bytes(scratch)
            if not self.fits(size):
                raise _OverLimit
            self._make_room(size)

    @contextlib.contextmanager
    def computing(self, entry: Path) -> Iterator[None]:
        """Waits until no other process is in such a block for the same entry; the lock ends with the block or the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f".{entry.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _mark_used(self, entry: Path) -> None:
        if self.limit_bytes is not None:
            with contextlib.suppress(OSError):  # a folder that can only be read
                os.utime(entry)

    def _make_room(self, size: int) -> None:
        """Removes the least recently used entries that no process reads, until `size` more bytes are within the limit."""
        if self.limit_bytes is None:
            return
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.glob(f"[!.]*{self.suffix}"):
            with contextlib.suppress(OSError):  # another process has removed it
                used.append((path.stat().st_mtime, stored_bytes(path), path))
        total = sum(entry_bytes for _, entry_bytes, _ in used)
        for _, entry_bytes, path in sorted(used):
            if total + size <= self.limit_bytes:
                return
            if _remove(path):
                total -= entry_bytes


class _OverLimit(Exception):
    """A new entry alone is over the limit of its cache."""


class BatchCache(Generic[K, T, V]):
    """Values in memory, of which one call of a function computes all that are missing.

    Args:
        key: returns what identifies an item.
        limit: number of values; all of them are dropped before there are more.
    """

    def __init__(self, key: Callable[[T], K], limit: int) -> None:
        self._key, self._limit = key, limit
        self._values: dict[K, V] = {}

    def values(self, items: Sequence[T], compute: Callable[[list[T]], Iterable[V]]) -> list[V]:
        """Returns the value of each item; `compute` returns those of the items that are missing."""
        keys = [self._key(item) for item in items]
        if len(self._values) + len(items) > self._limit:
            self._values.clear()
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._values}
        if missing:
            self._values.update(zip(missing, compute(list(missing.values())), strict=True))
        return [self._values[key] for key in keys]


@contextlib.contextmanager
def _locked(entry: Path, kind: int) -> Iterator[bool]:
    """Locks an entry, and yields whether it is there and locked; the kernel releases the lock of a process that dies."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, kind) and _is_at(entry, descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Returns whether no other process holds the lock; a file system without locks has no such process."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns whether an open file or folder is still at its path; another process may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _remove(entry: Path) -> bool:
    """Removes an entry unless a process reads it, and returns whether it did."""
    with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_free:
        if not is_free:
            return False
        try:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        except OSError:
            return False
        return True
