"""What calibration data tell of a model, kept for the next stage that asks the same of the same weights.

GGUF's importance matrix, the influence of blocks, the importance of units, the outliers of scores, the sensitivity of layers:
small beside the weights, but each takes a pass or more over all calibration tokens. Kept ones are found by the weights
themselves, so that whatever came before does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.core.files import whole
from winnow.hardware.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Statistics = dict[str, torch.Tensor]
FOLDER = "statistics"
MOST_BYTES = 10**9  # kept, the least recently used go first


def cached_statistics(
    model: PreTrainedModel, run: Run, kind: str, said: tuple[object, ...], compute: Callable[[], Statistics]
) -> Statistics:
    """What `compute` returns, or what it returned earlier for the same weights, architecture and code.

    Args:
        kind: what is computed, in a word.
        said: all else that it follows from, such as the hash of the calibration data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    folder = (run.cache or run.folder.parent) / FOLDER
    path = folder / f"{kind}-{key(model, kind, run.device, run.compute_dtype, *said)[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # not there, or damaged
        found: Statistics = load_file(path)
        os.utime(path)  # recently used
        run.log(f"{kind}: as kept in {path}")
        return found
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    # where the disk is full, say, they are computed again the next time
    with contextlib.suppress(OSError, SafetensorError), whole(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, scratch)
    _forget(folder)
    return found


def _forget(folder: Path) -> None:
    """Removes the least recently used ones beyond `MOST_BYTES`; another process may do so at the same time."""
    total = 0
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


def key(model: PreTrainedModel, *others: object) -> str:
    """SHA-256 over the weights in memory, the architecture, the code, and all else that statistics follow from."""
    from winnow.method.prefixes import code_sha256

    architecture = model.config.to_dict()
    architecture.pop("_name_or_path", None)  # where it lies does not matter
    said = (
        type(model).__name__,
        json.dumps(architecture, sort_keys=True, default=str),
        code_sha256("method", "data", "model"),
        others,
    )
    digest = hashlib.sha256(repr(said).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
