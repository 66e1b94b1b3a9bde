"""Liger's fused kernels for norms, rotary embeddings and gated activations (Hsu et al. 2024, arXiv:2410.10989), on CUDA.

    pip install 'winnow[liger]'

Losses keep their own chunks (`winnow.recovery.losses`), which know teachers and positions without a target, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def fuse(model: Any, device: str, log: Callable[[str], None]) -> bool:
    """Gives `model`, bare or wrapped by PEFT, the kernels that there are for its architecture; whether that was tried.

    Nothing is done on other devices, or where liger-kernel is not installed.
    """
    if not device.startswith("cuda") or importlib.util.find_spec("liger_kernel") is None:
        return False
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    log("training with Liger's kernels")
    return True
