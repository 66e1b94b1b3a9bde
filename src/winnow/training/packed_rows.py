"""Training documents packed into rows: no padding, the same rows for the same seed, resumable at any step.

A row (a *bin*) holds whole documents, about `tokens_per_device` tokens; each document starts at position 0 and sees itself
alone (`winnow.model.packed_attention`), as it will when the model is evaluated. The loss is on completions, and on all of a
document without a prompt.

One optimizer step takes the next `devices * accumulate` bins, whatever that product is made of, and weighs each of its target
tokens the same: the loss of a bin is divided by the targets of the whole step, which every device knows without asking.
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

WINDOW = 4096  # documents that are packed together: enough to fill bins well, few enough to stay in a random order


def pack(lengths: Sequence[int], capacity: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Bins of documents, by index, of at most `capacity` tokens each, in an order that depends on (seed, epoch) alone.

    Best-fit decreasing inside windows of random documents (Johnson 1974: at most 11/9 of the fewest bins); a bin that is
    not yet full enough waits for the next window.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    open_bins: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        # ascending fill, found by bisection; documents come longest first
        filled = sorted((sum(lengths[i] for i in made), n) for n, made in enumerate(open_bins))
        bins = open_bins
        for i in sorted(order[start : start + WINDOW], key=lambda i: -lengths[i]):
            length = lengths[i]
            found = _fullest(filled, capacity - length)
            if found is None:
                bins.append([i])
                bisect.insort(filled, (length, len(bins) - 1))
            else:
                fill, n = filled.pop(found)
                bins[n].append(i)
                bisect.insort(filled, (fill + length, n))
        last = start + WINDOW >= len(order)
        done = [bins[n] for fill, n in filled if last or fill >= 0.95 * capacity]
        open_bins = [] if last else [bins[n] for fill, n in filled if fill < 0.95 * capacity]
        rng.shuffle(done)
        for made in done:
            rng.shuffle(made)
            yield made


def _fullest(filled: list[tuple[int, int]], room: int) -> int | None:
    """The index of the fullest bin of at most `room` tokens; None if there is none."""
    found = bisect.bisect_right(filled, (room, len(filled) + WINDOW)) - 1
    return found if found >= 0 else None


def fingerprint(batch: dict[str, Any]) -> str:
    """What a batch is known by in messages: a hash of its token ids."""
    return hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()[:12]


class Documents(lightning.LightningDataModule):
    """Documents for training, forever (epoch after epoch), continued after a checkpoint where it left off.

    Args:
        rows: of which `held_out` are set aside to validate on, drawn by `seed`.
        tokens_per_device: the capacity of a bin; that of the longest document where that is more.
        pad: None to pack; else the id to pad rows with.

    A batch has, beside what `collate` makes, `documents` (indices into `rows`, in their order) and `step_targets` (the targets
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
        self.done = 0  # optimizer steps trained on

    def digest(self) -> str:
        """What the documents are known by: a hash of their ids."""
        found = hashlib.sha256()
        for i in self.training:
            found.update(array("q", [*self.rows[i].ids, -1]))
        return found.hexdigest()[:12]

    def bins(self) -> Iterator[list[int]]:
        """The bins of all epochs, one after the other."""
        lengths = [len(self.rows[i].ids) for i in self.training]
        for epoch in itertools.count():
            for made in pack(lengths, self.capacity, self.seed, epoch):
                yield [self.training[i] for i in made]

    def batch(self, documents: list[int], step_targets: int) -> dict[str, Any]:
        rows = [self.rows[i] for i in documents]
        made = collate(rows) if self.pad is None else collate_padded(rows, self.pad)
        return made | {"documents": documents, "step_targets": step_targets}

    def steps(self, devices: int, accumulate: int, rank: int) -> Iterator[dict[str, Any]]:
        """The batches of one device from the first step that has not been done: `accumulate` of them a step."""
        bins = self.bins()
        for step in itertools.count():
            taken = list(itertools.islice(bins, devices * accumulate))
            if step >= self.done:
                targets = sum(self.rows[i].target_count for made in taken for i in made)
                for made in taken[rank::devices]:
                    yield self.batch(made, targets)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        devices, accumulate, rank = 1, 1, 0
        if self.trainer is not None:
            devices, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
            rank = self.trainer.global_rank
        return self._loader(self.steps(devices, accumulate, rank))

    def held_out(self, devices: int = 1, rank: int = 0) -> list[dict[str, Any]]:
        """The batches of this device's share of the documents that are held out."""
        lengths = [len(self.rows[i].ids) for i in self.validation]
        made = list(pack(lengths, self.capacity, 0, 0))[rank::devices]
        return [self.batch([self.validation[i] for i in bin_], 0) for bin_ in made]

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
        return {"steps": self.trainer.global_step if self.trainer is not None else self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["steps"]


class _Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items
