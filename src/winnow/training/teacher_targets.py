"""Computes and caches a teacher's targets: sparse, unbiased samples of its distribution at every position that has a target.

A sample is N equally spaced points on the cumulative distribution, all shifted by one random number (systematic sampling). An
id of probability p occurs N p times, rounded up or down at random, so that its expected share of the sample is p. The variance
is below that of N independent draws, which Anshumann et al. 2025 (arXiv:2503.16870, section 4) use; storing only the most
probable ids is biased. The files store the sampled ids and their counts: at most 301 bytes per token for N = 60.

A folder `targets/<key>` holds, for documents in their order,

    ids.bin      uint16 or uint32, the ids at every position, ascending
    counts.bin   uint8, how often each id was sampled
    lengths.bin  uint8, the number of distinct ids of each position
    starts.bin   int64, where each document's ids begin, and the end of the last

All students with the same documents read it through the page cache. It is written under a temporary name and renamed when it is
complete; a later run continues what a killed run has written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.core.cache import Cache
from winnow.core.errors import UserError
from winnow.data.encoding import Encoded, collate, collate_padded, to_device
from winnow.model.lm import LM
from winnow.training.student import Student

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 320  # at most, in files
BATCH_TOKENS = 4096  # tokens in a batch of the teacher
CHUNK_BYTES = 64 * 2**20  # logits of the teacher at a time, in single precision
LOG_SECONDS = 10.0
FILES = ("ids", "counts", "lengths", "starts")


@dataclass(frozen=True)
class Sampling:
    """The settings for sampling the teacher's distribution.

    Attributes:
        points: N, the number of points on the cumulative distribution.
    """

    points: int = 60
    temperature: float = 1.0
    seed: int = 0


def systematic_sample(p_nv: torch.Tensor, starts_n: torch.Tensor, points: int) -> torch.Tensor:
    """Returns ascending ids [N, points], sampled from distributions [N, V], each with a random start in [0, 1)."""
    cumulative_nv = p_nv.cumsum(-1, dtype=torch.float64)  # in single precision, errors would exceed small probabilities
    points_nk = (torch.arange(points, device=p_nv.device, dtype=torch.float64) + starts_n[:, None]) / points
    ids_nk = torch.searchsorted(cumulative_nv, points_nk * cumulative_nv[:, -1:], right=True)
    return ids_nk.clamp_max_(p_nv.shape[-1] - 1)


def run_lengths(ids_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the distinct ids of ascending ids [N, K] as one flat tensor, their counts, and the number of them per position."""
    first_nk = torch.ones_like(ids_nk, dtype=torch.bool)
    first_nk[:, 1:] = ids_nk[:, 1:] != ids_nk[:, :-1]
    begins = first_nk.flatten().nonzero()[:, 0]
    counts = torch.diff(begins, append=begins.new_tensor([ids_nk.numel()]))  # every position begins a new run
    return ids_nk[first_nk], counts, first_nk.sum(-1)


def _cache_key(teacher: LM, rows: Sequence[Encoded], sampling: Sampling) -> list[Any]:
    """Returns the teacher, the sampling settings, and a hash of the documents' tokens and answers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row.ids), *row.ids, *itertools.chain(*row.answers)], dtype=np.int64).tobytes())
    return [teacher.sha256(), teacher.loading.dtype, dataclasses.asdict(sampling), digest.hexdigest()]


def id_type(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def max_bytes_per_position(points: int, vocabulary: int) -> int:
    """Returns the most bytes that a position takes, without the 8 bytes of each document."""
    return points * (np.dtype(id_type(vocabulary)).itemsize + 1) + 1


class Targets:
    """Reads the targets of `rows` from a folder.

    Raises:
        OSError, ValueError: the folder is missing, incomplete or damaged.
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

    def at_documents(self, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids [N, K] and their shares [N, K] at the N positions with a target in these documents, in their order.

        K is the largest number of ids of a position; positions with fewer ids are padded with share 0.
        """

        def concatenated(values: Any, bounds: Any) -> Any:
            return np.concatenate([values[bounds[i] : bounds[i + 1]] for i in documents])

        lengths_n = concatenated(self.lengths, self.positions)
        is_id_nk = np.arange(lengths_n.max(initial=0)) < lengths_n[:, None]
        ids_nk = np.zeros(is_id_nk.shape, np.int64)
        shares_nk = np.zeros(is_id_nk.shape, np.float32)
        ids_nk[is_id_nk] = concatenated(self.ids, self.starts)
        shares_nk[is_id_nk] = concatenated(self.counts, self.starts) / np.float32(self.points)
        return torch.from_numpy(ids_nk), torch.from_numpy(shares_nk)


def load_or_compute_targets(
    teacher: LM,
    rows: Sequence[Encoded],
    sampling: Sampling,
    cache: Path,
    vocabulary: int,
    load: Callable[[], Student],
) -> Targets:
    """Returns the targets of `rows` from `cache`, after computing them if they are missing.

    Processes that need the same targets at the same time wait for the first.

    Args:
        load: loads the teacher into memory; called only if the targets must be computed.

    Raises:
        UserError: the disk is full.
    """
    from winnow.core.errors import is_disk_full

    targets_cache = Cache(cache / "targets")
    entry = targets_cache.entry(_cache_key(teacher, rows, sampling))

    def read(folder: Path) -> Targets:
        return Targets(folder, rows, sampling.points, vocabulary)

    with targets_cache.computing(entry):
        targets = targets_cache.read(entry, read)
        if targets is not None:
            logger.info(f"targets: of {len(rows):,} documents, from {entry}")
            return targets
        try:
            with targets_cache.writing(entry, resumable=True) as partial:
                _write(partial, load(), rows, sampling, vocabulary)
        except OSError as error:
            if is_disk_full(error):
                raise UserError(f"{entry.parent}: the disk is full; free some space, or take teacher=online") from error
            raise
        return read(entry)


@torch.no_grad()
def _write(
    folder: Path,
    teacher: Student,
    rows: Sequence[Encoded],
    sampling: Sampling,
    vocabulary: int,
) -> None:
    """Writes the targets of all documents that the folder does not hold yet."""
    folder.mkdir(exist_ok=True)
    dtype = id_type(vocabulary)
    done, end = _resume(folder, rows, np.dtype(dtype).itemsize)
    if done:
        logger.info(f"targets: going on at document {done + 1:,} of {len(rows):,}")
    started = last_log = time.monotonic()
    tokens = 0
    with contextlib.ExitStack() as stack:
        ids_file, counts_file, lengths_file, starts_file = (
            stack.enter_context((folder / f"{name}.bin").open("ab")) for name in FILES
        )
        if not done:
            starts_file.write(np.int64(0).tobytes())
        for documents in _batches(rows, done):
            ids, counts, lengths = _sample_targets(teacher, rows, documents, sampling)
            ids_file.write(ids.astype(dtype).tobytes())
            counts_file.write(counts.astype(np.uint8).tobytes())
            lengths_file.write(lengths.astype(np.uint8).tobytes())
            for file in (ids_file, counts_file, lengths_file):
                file.flush()
            ends = np.append(0, np.cumsum(lengths))[np.cumsum([rows[i].target_count for i in documents])]
            # written last, because it marks how far the other files are valid
            starts_file.write((end + ends).astype(np.int64).tobytes())
            starts_file.flush()
            end += len(ids)
            tokens += sum(len(rows[i].ids) for i in documents)
            now = time.monotonic()
            if now - last_log >= LOG_SECONDS or documents[-1] == len(rows) - 1:
                seconds_left = (len(rows) - 1 - documents[-1]) * (now - started) / (documents[-1] + 1 - done)
                logger.info(
                    f"targets: {documents[-1] + 1:,} of {len(rows):,} documents  {tokens / (now - started):,.0f} tokens/s  "
                    f"{timedelta(seconds=round(seconds_left))} left"
                )
                last_log = now
        for file in (ids_file, counts_file, lengths_file, starts_file):
            os.fsync(file.fileno())


def _resume(folder: Path, rows: Sequence[Encoded], id_bytes: int) -> tuple[int, int]:
    """Truncates the folder's files to complete documents; returns the number of documents and of their ids."""
    files = {name: folder / f"{name}.bin" for name in FILES}
    entries = files["starts"].stat().st_size // 8 if files["starts"].is_file() else 0
    if entries > 1:
        starts = np.fromfile(files["starts"], np.int64, count=entries)
        done, end = entries - 1, int(starts[-1])
        positions = sum(row.target_count for row in rows[:done])
        sizes = {"ids": end * id_bytes, "counts": end, "lengths": positions, "starts": 8 * entries}
        if all(files[name].is_file() and files[name].stat().st_size >= size for name, size in sizes.items()):
            for name, size in sizes.items():
                os.truncate(files[name], size)
            return done, end
    for file in files.values():
        file.unlink(missing_ok=True)
    return 0, 0


def _batches(rows: Sequence[Encoded], start: int) -> Iterator[list[int]]:
    """Yields batches of document indices from `start` on, in order, of at most `BATCH_TOKENS` tokens each."""
    batch: list[int] = []
    batch_tokens = 0
    for i in range(start, len(rows)):
        length = len(rows[i].ids)
        if batch and batch_tokens + length > BATCH_TOKENS:
            yield batch
            batch, batch_tokens = [], 0
        batch.append(i)
        batch_tokens += length
    if batch:
        yield batch


def _sample_targets(teacher: Student, rows: Sequence[Encoded], documents: list[int], sampling: Sampling) -> list[Any]:
    """Samples the positions with a target in these documents; returns ids, counts and lengths as `run_lengths` does."""
    encoded = [rows[i] for i in documents]
    # a document's random starts do not depend on the other documents of its batch
    starts = np.concatenate([np.random.default_rng([sampling.seed, i]).random(rows[i].target_count) for i in documents])
    if not len(starts):
        return [np.zeros(0, np.int64)] * 3
    pad = int(getattr(teacher.base.config, "pad_token_id", None) or 0)
    batch = collate(encoded) if teacher.packs else collate_padded(encoded, pad)
    device = teacher.base.device
    hidden_nh, _ = teacher.at_targets(to_device(batch, device))
    starts_n = torch.from_numpy(starts).to(device)
    head = teacher.head
    size = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    parts = []
    for first in range(0, len(starts_n), size):
        part = slice(first, first + size)
        p_nv = (head(hidden_nh[part]) / sampling.temperature).softmax(-1)
        parts.append(run_lengths(systematic_sample(p_nv, starts_n[part], sampling.points)))
    return [torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)]
