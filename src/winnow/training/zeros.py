"""Keeps pruned weights exactly zero while a whole model is trained.

The gradients of pruned weights are set to zero, so that they do not enter the momentum or the gradient clipping. Because some
optimizers move every weight of a matrix (Muon orthogonalises its momentum), the zeros are also written again after every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SPARSE_FROM = 0.01  # share of zeros from which a matrix counts as pruned


class Zeros:
    """The mask of a matrix's zeros, with the layout of the weights when it is used: on their device or sharded."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.mask = linear.weight.detach() == 0

    def mask_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the mask on the device of `tensor`, sharded like it."""
        if type(self.mask) is not type(tensor.detach()) and hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            full_mask = self.mask.to(tensor.device)
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            self.mask = distribute_tensor(full_mask, mesh, placements, src_data_rank=None)
        elif self.mask.device != tensor.device:
            self.mask = self.mask.to(tensor.device)
        return self.mask

    def of_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(self.mask_like(gradient), 0.0)

    def restore(self) -> None:
        with torch.no_grad():
            self.linear.weight.masked_fill_(self.mask_like(self.linear.weight), 0.0)


@contextlib.contextmanager
def keep_zeros(model: nn.Module) -> Iterator[int]:
    """Keeps the zeros of the pruned linear layers in the blocks inside the context, and yields the number of those layers.

    The cost is one byte per weight of the pruned layers, and two passes over them per step.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from winnow.model.layers import linears

    matrices = [Zeros(linear) for linear in linears(model).values()]
    matrices = [zeros for zeros in matrices if zeros.mask.float().mean() >= SPARSE_FROM]

    def restore(*_: Any) -> None:
        for zeros in matrices:
            zeros.restore()

    handles: list[Any] = [zeros.linear.weight.register_hook(zeros.of_gradient) for zeros in matrices]
    if matrices:
        handles.append(register_optimizer_step_post_hook(restore))
    try:
        yield len(matrices)
    finally:
        for handle in handles:
            handle.remove()
