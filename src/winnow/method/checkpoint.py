"""Saves checkpoints of an iteration over the blocks, so that an interrupted run continues at the block that it had reached.

Every few minutes the finished blocks and the hidden states that enter the next one are written to a folder, as safetensors.
The files end in `.ckpt`, which marks a failed run's scratch folder to be kept for the next run. A block is written once.
`walk.ckpt`, which says how many blocks are valid, is written last, and each file under another name first. A finished run's
scratch folder is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from winnow.core.files import atomic_write
from winnow.hardware.run import Run
from winnow.model.lm import LM

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 300.0


class Checkpoint:
    """The state of a stage's iteration over the blocks in `folder`, which has the stage's name.

    Only a run with the same fingerprint resumes it.

    Attributes:
        done: number of finished blocks.
        state: JSON values that a method stores besides the weights; loaded from the folder.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.done = 0
        self.state: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        self._broken = False
        record = self._read()
        if record is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self.done, self.state = record["done"], record["state"]

    @property
    def _walk_file(self) -> Path:
        return self.folder / "walk.ckpt"

    def _block_file(self, index: int) -> Path:
        return self.folder / f"block-{index}.ckpt"

    def _read(self) -> dict[str, Any] | None:
        """Returns the record of an iteration with this fingerprint; None without one, or if one of its files is damaged."""
        try:
            with safe_open(self._walk_file, "pt") as file:
                record: dict[str, Any] = json.loads(file.metadata()["walk"])
            if record["fingerprint"] != self.fingerprint:
                return None
            for index in range(record["done"]):
                with safe_open(self._block_file(index), "pt"):  # also compares the file's length with its header
                    pass
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return record

    def restore(self, blocks: nn.ModuleList) -> list[torch.Tensor]:
        """Loads the weights of the `done` blocks and returns the hidden states that enter the next one."""
        for index in range(self.done):
            blocks[index].load_state_dict(load_file(self._block_file(index)))
        hidden = load_file(self._walk_file)
        logger.info(f"{self.folder.name}: going on at block {self.done + 1} of {len(blocks)}")
        return [hidden[str(number)] for number in range(len(hidden))]

    def save(self, blocks: nn.ModuleList, done: int, hidden: Sequence[torch.Tensor]) -> None:
        """Writes the first `done` blocks and the inputs of the next, at most every `SAVE_EVERY_S` seconds.

        Nothing is written after the last block, where nothing is left to resume. If the disk is full, the run continues
        without checkpoints.
        """
        if self._broken or done == len(blocks) or time.monotonic() - self._saved_at < SAVE_EVERY_S:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for index in range(self.done, done):
                self._write(self._block_file(index), blocks[index].state_dict())
            walk = {"fingerprint": self.fingerprint, "done": done, "state": self.state}
            tensors = {str(number): state for number, state in enumerate(hidden)}
            self._write(self._walk_file, tensors, {"walk": json.dumps(walk)})
        except (OSError, SafetensorError) as error:
            logger.info(f"{self.folder.name}: no checkpoint could be written ({error}); going on without")
            self._broken = True
            shutil.rmtree(self.folder, ignore_errors=True)  # the artifact may need the disk space
            return
        self.done, self._saved_at = done, time.monotonic()

    @staticmethod
    def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        with atomic_write(path) as scratch:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)


def checkpoint_of(stage: Any, lm: LM, run: Run, calibration_sha256: str) -> Checkpoint:
    """Returns the checkpoint of a stage's iteration over the blocks of `lm`, under the run's folder.

    Its fingerprint covers the stage and its knobs, the calibration data, the seed, and the model before the stage.
    """
    name = type(stage).__name__.lower()
    fields = {
        "stage": name,
        "knobs": dataclasses.asdict(stage),
        "calibration": calibration_sha256,
        "seed": run.seed,
        "dtype": run.compute_dtype,
        "config": lm.model.config.to_json_string(),
        "weights": _checksum(lm.model),
    }
    fingerprint = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    return Checkpoint(run.folder / "walk" / name, fingerprint)


def _checksum(model: nn.Module) -> str:
    """Returns a hash over each parameter's name, shape, type and the sum of its bits as integers, a fast checksum."""
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(integers[parameter.element_size()])
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {bits.sum().item()}\n".encode())
    return digest.hexdigest()
