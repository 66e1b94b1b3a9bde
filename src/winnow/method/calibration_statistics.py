"""Caches statistics of a model on calibration data, for the next stage that needs the same statistics of the same weights.

Such statistics are GGUF's importance matrix, the influence of blocks, the importance of units, the outliers of scores and the
sensitivity of layers. They are small compared with the weights, but each takes one or more passes over all calibration tokens.
The key covers the weights themselves, so the stages that produced the weights do not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from winnow.core.cache import Cache
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
    cache = Cache(folder, suffix=".safetensors", limit_bytes=MOST_BYTES, damage=(SafetensorError,))
    entry = cache.entry([*_key_parts(model), run.device, run.compute_dtype, *key_parts], name=kind)
    statistics = cache.read(entry, load_file)
    if statistics is not None:
        logger.info(f"{kind}: as kept in {entry}")
        return statistics
    statistics = compute()
    # if writing fails (a full disk, for example), the next run computes them again
    with contextlib.suppress(OSError, SafetensorError), cache.writing(entry) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in statistics.items()}, scratch)
    return statistics


def _key_parts(model: PreTrainedModel) -> list[object]:
    """Returns the model's architecture, the SHA-256 of its weights in memory, and that of the code."""
    from winnow.method.prefixes import code_sha256

    architecture = model.config.to_dict()
    architecture.pop("_name_or_path", None)  # the model's location does not matter
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return [type(model).__name__, architecture, digest.hexdigest(), code_sha256("method", "data", "model")]
