"""Pruned weights stay exactly zero while a whole model is trained.

Gradients of zeros are zeroed, so that no momentum points at them and clipping does not see them; and because some optimizers
move every weight of a matrix (Muon orthogonalises its momentum), zeros are written again after every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SPARSE_FROM = 0.01  # share of zeros from which a matrix counts as pruned


class Zeros:
    """Where a matrix is zero, laid out as its weights are when it is asked for: on their device, or spread over several."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.mask = linear.weight.detach() == 0

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(self.mask) is not type(tensor.detach()) and hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            whole = self.mask.to(tensor.device)
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            self.mask = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        elif self.mask.device != tensor.device:
            self.mask = self.mask.to(tensor.device)
        return self.mask

    def of_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(self.like(gradient), 0.0)

    def restore(self) -> None:
        with torch.no_grad():
            self.linear.weight.masked_fill_(self.like(self.linear.weight), 0.0)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[int]:
    """Meanwhile no optimizer moves the zeros of the linear layers in the blocks; gives the number of those layers.

    Costs a byte a weight of the pruned layers, and two passes over them a step.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from winnow.model.layers import linears

    found = [Zeros(linear) for linear in linears(model).values()]
    found = [zeros for zeros in found if zeros.mask.float().mean() >= SPARSE_FROM]

    def restore(*_: Any) -> None:
        for zeros in found:
            zeros.restore()

    handles: list[Any] = [zeros.linear.weight.register_hook(zeros.of_gradient) for zeros in found]
    if found:
        handles.append(register_optimizer_step_post_hook(restore))
    try:
        yield len(found)
    finally:
        for handle in handles:
            handle.remove()
