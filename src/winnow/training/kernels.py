"""Applies Liger's fused kernels for norms, rotary embeddings and gated activations (Hsu et al. 2024, arXiv:2410.10989) on CUDA.

    pip install 'winnow[liger]'

The library replaces functions and classes of transformers' modules, and methods of the model's layers, for the rest of the
process. A model of the same architecture then fails on the CPU, where Triton cannot run. `fused` undoes every replacement.

Liger's losses are not used: those of `winnow.training.losses` also support teachers and positions without a target.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)

_MISSING = object()


@contextlib.contextmanager
def fused(model: Any, device: str) -> Iterator[None]:
    """Applies the kernels for the architecture of `model`, with or without a PEFT wrapper, until the context ends.

    It does nothing on devices other than CUDA, or without liger-kernel. Other models of the architecture may be used meanwhile
    on the same device; they share some of the kernels.
    """
    if not device.startswith("cuda") or importlib.util.find_spec("liger_kernel") is None:
        yield
        return
    import liger_kernel.transformers  # type: ignore[import-not-found]  # noqa: F401  (it imports architectures)
    from transformers.integrations.liger import apply_liger_kernel

    before = _snapshot(model)
    replaced: list[tuple[Any, str, Any]] = []
    try:
        try:
            apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        finally:
            replaced = _changed_attributes(before)
        logger.info("training with Liger's kernels")
        yield
    finally:
        _restore(replaced)


def _snapshot(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Returns each owner of attributes that the library may replace (a dictionary or a class), with a copy of its attributes.

    The owners are the modules of transformers that define architectures, the classes defined there, `torch.nn` (whose LayerNorm
    the library replaces for some architectures), and the layers of `model` and their dictionaries of sublayers.
    """
    import torch

    owners: list[Any] = [vars(torch.nn), vars(torch.nn.functional)]
    for name, module in list(sys.modules.items()):
        if module is not None and name.rpartition(".")[2].startswith("modeling_"):
            owners.append(vars(module))
            owners += [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]
    for layer in model.modules():
        owners += [vars(layer), layer._modules]
    return [(owner, dict(_attributes(owner))) for owner in owners]


def _attributes(owner: Any) -> Any:
    return vars(owner) if isinstance(owner, type) else owner


def _changed_attributes(before: Sequence[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, str, Any]]:
    """Returns owner, name and former value of each attribute that is not the same object as before."""
    changed = []
    for owner, former in before:
        current = _attributes(owner)
        names = former.keys() | current.keys()
        changed += [
            (owner, x, former.get(x, _MISSING))
            for x in names
            if former.get(x, _MISSING) is not current.get(x, _MISSING)
        ]
    return changed


def _restore(replaced: Sequence[tuple[Any, str, Any]]) -> None:
    """Restores the former values of these attributes only, since training changes other attributes of the layers."""
    for owner, name, value in replaced:
        if isinstance(owner, type):
            if value is not _MISSING:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        elif value is not _MISSING:
            owner[name] = value
        else:
            owner.pop(name, None)
