"""Packs training documents into rows without padding; the rows depend on the seed alone, and training resumes at any step.

A row (a *bin*) holds whole documents, about `tokens_per_device` tokens. Each document starts at position 0 and attends only to
itself (`winnow.model.packed_attention`), as it will when the model is evaluated. The loss covers completions, and every token of
a document without a prompt.

One optimizer step takes the next `devices * accumulate` bins, whatever the two factors are, and weighs all of its target tokens
equally: the loss of a bin is divided by the targets of the whole step, which every device computes without communication.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch

from winnow.core.errors import UserError
from winnow.data.encoding import Encoded, collate, collate_padded

WINDOW = 4096  # documents that are packed together: enough to fill bins well, few enough to keep the order random


def pack(lengths: Sequence[int], capacity: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yields bins of document indices, at most `capacity` tokens each, in an order that depends on (seed, epoch) alone.

    The algorithm is best-fit decreasing inside windows of random documents (Johnson 1974: at most 11/9 of the fewest bins). A bin
    that is not full enough waits for the next window.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    open_bins: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        # (fill, bin index) in ascending order, searched by bisection; the longest document comes first
        filled = sorted((sum(lengths[i] for i in documents), n) for n, documents in enumerate(open_bins))
        bins = open_bins
        for i in sorted(order[start : start + WINDOW], key=lambda i: -lengths[i]):
            length = lengths[i]
            position = _fullest_with_room(filled, capacity - length)
            if position is None:
                bins.append([i])
                bisect.insort(filled, (length, len(bins) - 1))
            else:
                fill, n = filled.pop(position)
                bins[n].append(i)
                bisect.insort(filled, (fill + length, n))
        last = start + WINDOW >= len(order)
        full_bins = [bins[n] for fill, n in filled if last or fill >= 0.95 * capacity]
        open_bins = [] if last else [bins[n] for fill, n in filled if fill < 0.95 * capacity]
        rng.shuffle(full_bins)
        for documents in full_bins:
            rng.shuffle(documents)
            yield documents


def _fullest_with_room(filled: list[tuple[int, int]], max_fill: int) -> int | None:
    """Returns the position in `filled` of the fullest bin of at most `max_fill` tokens; None if there is none."""
    position = bisect.bisect_right(filled, (max_fill, len(filled) + WINDOW)) - 1
    return position if position >= 0 else None


def fingerprint(batch: dict[str, Any]) -> str:
    """Returns a hash of a batch's token ids, which identifies it in messages."""
    return hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()[:12]


class Documents(lightning.LightningDataModule):
    """Yields training documents without end (epoch after epoch), and continues after a checkpoint where it stopped.

    Args:
        rows: encoded documents; `held_out` of them, sampled by `seed`, are set aside for validation.
        tokens_per_device: the capacity of a bin, raised to the longest document if that is longer.
        pad: the id to pad rows with; None packs them instead.

    A batch has the entries of `collate`, and `documents` (indices into `rows`, in their order) and `step_targets` (the targets
    of the whole optimizer step, over all its bins).
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        tokens_per_device: int,
        seed: int,
        held_out: int = 0,
        pad: int | None = None,
    ) -> None:
        super().__init__()
        usable = [i for i, row in enumerate(rows) if row.target_count]
        if len(usable) <= held_out:
            raise UserError(
                f"calibration.source gives {len(usable)} documents with something to learn, of which {held_out} would be "
                f"held out; give more documents"
            )
        random.Random(f"{seed}/held out").shuffle(usable)
        self.rows, self.seed, self.pad = rows, seed, pad
        self.validation, self.training = sorted(usable[:held_out]), sorted(usable[held_out:])
        self.capacity = max([tokens_per_device, *(len(rows[i].ids) for i in usable)])
        self.completed_steps = 0  # optimizer steps

    def digest(self) -> str:
        """Returns a hash of the training documents' token ids."""
        sha256 = hashlib.sha256()
        for i in self.training:
            sha256.update(array("q", [*self.rows[i].ids, -1]))
        return sha256.hexdigest()[:12]

    def bins(self) -> Iterator[list[int]]:
        """Yields the bins of all epochs, one after the other."""
        lengths = [len(self.rows[i].ids) for i in self.training]
        for epoch in itertools.count():
            for positions in pack(lengths, self.capacity, self.seed, epoch):
                yield [self.training[i] for i in positions]

    def batch(self, documents: list[int], step_targets: int) -> dict[str, Any]:
        """Returns the batch of one bin."""
        rows = [self.rows[i] for i in documents]
        tensors = collate(rows) if self.pad is None else collate_padded(rows, self.pad)
        return tensors | {"documents": documents, "step_targets": step_targets}

    def steps(self, devices: int, accumulate: int, rank: int) -> Iterator[dict[str, Any]]:
        """Yields the batches of one device, `accumulate` per step, from the first step that is not completed."""
        bins = self.bins()
        for step in itertools.count():
            step_bins = list(itertools.islice(bins, devices * accumulate))
            if step >= self.completed_steps:
                targets = sum(self.rows[i].target_count for documents in step_bins for i in documents)
                for documents in step_bins[rank::devices]:
                    yield self.batch(documents, targets)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        devices, accumulate, rank = 1, 1, 0
        if self.trainer is not None:
            devices, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
            rank = self.trainer.global_rank
        return self._loader(self.steps(devices, accumulate, rank))

    def held_out(self, devices: int = 1, rank: int = 0) -> list[dict[str, Any]]:
        """Returns the batches of this device's share of the held-out documents."""
        lengths = [len(self.rows[i].ids) for i in self.validation]
        device_bins = list(pack(lengths, self.capacity, 0, 0))[rank::devices]
        return [self.batch([self.validation[i] for i in positions], 0) for positions in device_bins]

    def _loader(self, items: Iterator[Any]) -> torch.utils.data.DataLoader[Any]:
        cuda = (
            torch.cuda.is_available() and self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        )
        return torch.utils.data.DataLoader(
            _Stream(items),
            batch_size=None,
            num_workers=1 if cuda else 0,
            prefetch_factor=4 if cuda else None,
            pin_memory=cuda,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.trainer.global_step if self.trainer is not None else self.completed_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.completed_steps = state_dict["steps"]


class _Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items
