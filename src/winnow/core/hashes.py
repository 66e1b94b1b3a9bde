"""Hashes files, and caches the hashes of large ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

from winnow.core.cache import Cache, cache_root

SMALL_BYTES = 16 * 2**20  # files below this size are hashed anew on every call
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SETTLED_S = 2.0  # longer than the clock resolution of any file system


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
    samples = hashlib.sha256()
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(stat.st_size * sample // _SAMPLES)
            samples.update(file.read(_SAMPLE_BYTES))
        cache = Cache(cache_root() / "hashes")
        version = [path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, samples.hexdigest()]
        entry = cache.entry(version)
        cached = cache.read(entry, _read_digest)
        if cached is not None:
            return cached
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_mtime > _SETTLED_S and path.stat().st_mtime_ns == stat.st_mtime_ns:
        # a cache that cannot be written costs time only: the file is read again next time
        with contextlib.suppress(OSError), cache.writing(entry) as scratch:
            scratch.write_text(f"{digest}\n", encoding="utf-8")
    return digest


def _read_digest(path: Path) -> str:
    digest = path.read_text(encoding="utf-8").strip()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{path} is damaged")
    return digest
