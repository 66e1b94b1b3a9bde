"""Caches statistics of a model on calibration data, for the next stage that needs the same statistics of the same weights.

Such statistics are GGUF's importance matrix, the influence of blocks, the importance of units, the outliers of scores and the
sensitivity of layers. They are small compared with the weights, but each takes one or more passes over all calibration tokens.
The key covers the weights themselves, so the stages that produced the weights do not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.core.files import atomic_write
from winnow.hardware.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Statistics = dict[str, torch.Tensor]
FOLDER = "statistics"
MOST_BYTES = 10**9  # limit of the folder; the least recently used files are removed first


def cached_statistics(
    model: PreTrainedModel, run: Run, kind: str, key_parts: tuple[object, ...], compute: Callable[[], Statistics]
) -> Statistics:
    """Returns the result of `compute`, from the cache if it was computed before for the same weights, architecture and code.

    Args:
        kind: name of the statistics, in one word.
        key_parts: all else that the result depends on, such as the hash of the calibration data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    folder = (run.cache or run.folder.parent) / FOLDER
    path = folder / f"{kind}-{key(model, kind, run.device, run.compute_dtype, *key_parts)[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # the file is missing or damaged
        statistics: Statistics = load_file(path)
        os.utime(path)  # marks it as recently used
        logger.info(f"{kind}: as kept in {path}")
        return statistics
    statistics = compute()
    folder.mkdir(parents=True, exist_ok=True)
    # if writing fails (a full disk, for example), the next run computes them again
    with contextlib.suppress(OSError, SafetensorError), atomic_write(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in statistics.items()}, scratch)
    _evict(folder)
    return statistics


def _evict(folder: Path) -> None:
    """Removes the least recently used files beyond `MOST_BYTES`; another process may do so at the same time."""
    total = 0
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


def key(model: PreTrainedModel, *key_parts: object) -> str:
    """Returns the SHA-256 over the weights in memory, the architecture, the code, and the `key_parts`."""
    from winnow.method.prefixes import code_sha256

    architecture = model.config.to_dict()
    architecture.pop("_name_or_path", None)  # the model's location does not matter
    fields = (
        type(model).__name__,
        json.dumps(architecture, sort_keys=True, default=str),
        code_sha256("method", "data", "model"),
        key_parts,
    )
    digest = hashlib.sha256(repr(fields).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
