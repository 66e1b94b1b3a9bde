"""A teacher's targets, computed once: sparse, unbiased samples of its distribution at every position that has a target.

A sample is N equally spaced points on the cumulative distribution, all shifted by one random number (systematic sampling): an
id of probability p is met N p times, rounded up or down at random, so that its share of the sample is p in the mean. The
variance is below that of N independent draws, which Anshumann et al. 2025 (arXiv:2503.16870, section 4) take; keeping the
most probable ids instead is biased. Stored are the ids that were met and how often: at most 301 bytes a token for N = 60.

A folder `targets/<key>` holds, for documents in their order,

    ids.bin      uint16 or uint32, the ids at every position, ascending
    counts.bin   uint8, how often each was met
    lengths.bin  uint8, how many ids each position has
    starts.bin   int64, where each document's ids begin, and the end of the last

and is read through the page cache by as many students as use the same documents. It is written under another name, which it
loses when it is whole; what a killed run has written of it is gone on with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.core.errors import UserError
from winnow.data.encoding import Encoded, collate, collate_padded, moved
from winnow.model.lm import LM
from winnow.training.student import Student

BYTES_PER_TOKEN = 320  # at most, in files
BATCH_TOKENS = 4096  # that the teacher reads at a time
CHUNK_BYTES = 64 * 2**20  # of its logits at a time, in single precision
LOG_SECONDS = 10.0
FILES = ("ids", "counts", "lengths", "starts")


@dataclass(frozen=True)
class Sampling:
    """How the teacher's distribution is sampled.

    Attributes:
        points: N, on the cumulative distribution.
    """

    points: int = 60
    temperature: float = 1.0
    seed: int = 0


def systematic(p_nv: torch.Tensor, starts_n: torch.Tensor, points: int) -> torch.Tensor:
    """Ids [N, points], ascending: of distributions [N, V], each with its random start from [0, 1)."""
    cumulative_nv = p_nv.cumsum(-1, dtype=torch.float64)  # in single precision, errors would exceed small probabilities
    at_nk = (torch.arange(points, device=p_nv.device, dtype=torch.float64) + starts_n[:, None]) / points
    found = torch.searchsorted(cumulative_nv, at_nk * cumulative_nv[:, -1:], right=True)
    return found.clamp_max_(p_nv.shape[-1] - 1)


def counted(ids_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ascending ids [N, K]: those that differ, one position after the other; how often each occurs; how many a position has."""
    first_nk = torch.ones_like(ids_nk, dtype=torch.bool)
    first_nk[:, 1:] = ids_nk[:, 1:] != ids_nk[:, :-1]
    begins = first_nk.flatten().nonzero()[:, 0]
    counts = torch.diff(begins, append=begins.new_tensor([ids_nk.numel()]))  # a position begins with a first one
    return ids_nk[first_nk], counts, first_nk.sum(-1)


def key_of(teacher: LM, rows: Sequence[Encoded], sampling: Sampling) -> str:
    """What the targets are known by: the teacher, the documents' tokens and answers, and how it is sampled."""
    digest = hashlib.sha256(
        json.dumps([teacher.sha256(), teacher.loading.dtype, dataclasses.asdict(sampling)]).encode()
    )
    for row in rows:
        digest.update(np.asarray([len(row.ids), *row.ids, *itertools.chain(*row.answers)], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def id_type(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def most_bytes(points: int, vocabulary: int) -> int:
    """Of a position, at most, without the 8 bytes of each document."""
    return points * (np.dtype(id_type(vocabulary)).itemsize + 1) + 1


class Targets:
    """The targets of `rows` in a folder.

    Raises:
        OSError, ValueError: the folder does not hold them whole.
    """

    def __init__(self, folder: Path, rows: Sequence[Encoded], points: int, vocabulary: int) -> None:
        types: tuple[type[Any], ...] = (id_type(vocabulary), np.uint8, np.uint8, np.int64)
        self.ids, self.counts, self.lengths, self.starts = (
            np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in zip(FILES, types, strict=True)
        )
        self.points = points
        self.positions = np.concatenate([[0], np.cumsum([row.target_count for row in rows])])
        sizes = (len(rows) + 1, self.positions[-1], self.starts[-1], self.starts[-1])
        if sizes != (len(self.starts), len(self.lengths), len(self.ids), len(self.counts)):
            raise ValueError(f"{folder} is damaged")

    def of(self, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [N, K] and their shares [N, K] at the N positions with a target in these documents, one after the other.

        K is the most ids of a position; the rest of a shorter one has share 0.
        """

        def joined(values: Any, bounds: Any) -> Any:
            return np.concatenate([values[bounds[i] : bounds[i + 1]] for i in documents])

        lengths_n = joined(self.lengths, self.positions)
        there_nk = np.arange(lengths_n.max(initial=0)) < lengths_n[:, None]
        ids_nk = np.zeros(there_nk.shape, np.int64)
        shares_nk = np.zeros(there_nk.shape, np.float32)
        ids_nk[there_nk] = joined(self.ids, self.starts)
        shares_nk[there_nk] = joined(self.counts, self.starts) / np.float32(self.points)
        return torch.from_numpy(ids_nk), torch.from_numpy(shares_nk)


def targets_of(
    teacher: LM,
    rows: Sequence[Encoded],
    sampling: Sampling,
    cache: Path,
    vocabulary: int,
    load: Callable[[], Student],
    log: Callable[[str], None],
) -> Targets:
    """The targets of `rows`; computed if `cache` does not hold them, for which `load` gives the teacher in memory.

    Processes that want the same ones at the same time wait for the first.

    Raises:
        UserError: the disk is full.
    """
    from winnow.core.errors import is_disk_full

    folder = cache / "targets" / key_of(teacher, rows, sampling)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError):
            found = Targets(folder, rows, sampling.points, vocabulary)
            log(f"targets: of {len(rows):,} documents, from {folder}")
            return found
        partial = folder.with_suffix(".partial")
        try:
            _write(partial, load(), rows, sampling, vocabulary, log)
        except OSError as error:
            if is_disk_full(error):
                raise UserError(
                    f"{folder.parent}: the disk is full; free some space, or take teacher=online"
                ) from error
            raise
        if folder.exists():  # damaged
            _remove(folder)
        partial.rename(folder)
    return Targets(folder, rows, sampling.points, vocabulary)


@torch.no_grad()
def _write(
    folder: Path,
    teacher: Student,
    rows: Sequence[Encoded],
    sampling: Sampling,
    vocabulary: int,
    log: Callable[[str], None],
) -> None:
    folder.mkdir(exist_ok=True)
    dtype = id_type(vocabulary)
    done, end = _resumed(folder, rows, np.dtype(dtype).itemsize)
    if done:
        log(f"targets: going on at document {done + 1:,} of {len(rows):,}")
    began = said = time.monotonic()
    tokens = 0
    with contextlib.ExitStack() as opened:
        ids_file, counts_file, lengths_file, starts_file = (
            opened.enter_context((folder / f"{name}.bin").open("ab")) for name in FILES
        )
        if not done:
            starts_file.write(np.int64(0).tobytes())
        for documents in _batches(rows, done):
            ids, counts, lengths = _sampled(teacher, rows, documents, sampling)
            ids_file.write(ids.astype(dtype).tobytes())
            counts_file.write(counts.astype(np.uint8).tobytes())
            lengths_file.write(lengths.astype(np.uint8).tobytes())
            for file in (ids_file, counts_file, lengths_file):
                file.flush()
            ends = np.append(0, np.cumsum(lengths))[np.cumsum([rows[i].target_count for i in documents])]
            starts_file.write((end + ends).astype(np.int64).tobytes())  # last: it says how far the others are valid
            starts_file.flush()
            end += len(ids)
            tokens += sum(len(rows[i].ids) for i in documents)
            now = time.monotonic()
            if now - said >= LOG_SECONDS or documents[-1] == len(rows) - 1:
                left = (len(rows) - 1 - documents[-1]) * (now - began) / (documents[-1] + 1 - done)
                log(
                    f"targets: {documents[-1] + 1:,} of {len(rows):,} documents  {tokens / (now - began):,.0f} tokens/s  "
                    f"{timedelta(seconds=round(left))} left"
                )
                said = now
        for file in (ids_file, counts_file, lengths_file, starts_file):
            os.fsync(file.fileno())


def _resumed(folder: Path, rows: Sequence[Encoded], id_bytes: int) -> tuple[int, int]:
    """How many documents a folder holds, and how many ids they have; whatever is beyond them is cut off."""
    files = {name: folder / f"{name}.bin" for name in FILES}
    whole = files["starts"].stat().st_size // 8 if files["starts"].is_file() else 0
    if whole > 1:
        starts = np.fromfile(files["starts"], np.int64, count=whole)
        done, end = whole - 1, int(starts[-1])
        positions = sum(row.target_count for row in rows[:done])
        sizes = {"ids": end * id_bytes, "counts": end, "lengths": positions, "starts": 8 * whole}
        if all(files[name].is_file() and files[name].stat().st_size >= size for name, size in sizes.items()):
            for name, size in sizes.items():
                os.truncate(files[name], size)
            return done, end
    for file in files.values():
        file.unlink(missing_ok=True)
    return 0, 0


def _batches(rows: Sequence[Encoded], start: int) -> Iterator[list[int]]:
    """Documents from `start` on, in their order, of at most `BATCH_TOKENS` together."""
    batch: list[int] = []
    held = 0
    for i in range(start, len(rows)):
        length = len(rows[i].ids)
        if batch and held + length > BATCH_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(i)
        held += length
    if batch:
        yield batch


def _sampled(teacher: Student, rows: Sequence[Encoded], documents: list[int], sampling: Sampling) -> list[Any]:
    """Ids, counts and lengths of the positions with a target in these documents, as `counted` gives them."""
    asked = [rows[i] for i in documents]
    # a document's starts depend on nothing else that is computed with it
    starts = np.concatenate([np.random.default_rng([sampling.seed, i]).random(rows[i].target_count) for i in documents])
    if not len(starts):
        return [np.zeros(0, np.int64)] * 3
    pad = int(getattr(teacher.base.config, "pad_token_id", None) or 0)
    batch = collate(asked) if teacher.packs else collate_padded(asked, pad)
    device = teacher.base.device
    hidden_nh, _ = teacher.at_targets(moved(batch, device))
    starts_n = torch.from_numpy(starts).to(device)
    head = teacher.head
    size = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    parts = []
    for first in range(0, len(starts_n), size):
        part = slice(first, first + size)
        p_nv = (head(hidden_nh[part]) / sampling.temperature).softmax(-1)
        parts.append(counted(systematic(p_nv, starts_n[part], sampling.points)))
    return [torch.cat(found).cpu().numpy() for found in zip(*parts, strict=True)]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock; the system lets go of one whose process has died."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(folder: Path) -> None:
    for name in FILES:
        (folder / f"{name}.bin").unlink(missing_ok=True)
    folder.rmdir()
