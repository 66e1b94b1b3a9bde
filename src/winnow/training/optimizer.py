"""Combines Muon for the matrices inside the blocks and AdamW for everything else into one optimizer for Lightning.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers") orthogonalises the momentum of each weight matrix;
embeddings, norms and vectors use AdamW. `match_rms_adamw` (Moonshot AI 2025, arXiv:2502.16982, eq. 4) scales its
updates so that both take the same learning rate.

torch's own Muon multiplies in bfloat16 for every weight dtype, which takes most of a step on a CPU without bfloat16
instructions. There, `Float32Muon` multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from winnow.hardware.compute import BFLOAT16, fastest_dtype
from winnow.model.layers import block_index_of_parameters


def orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Returns the matrix with singular values near 1, by Newton-Schulz iterations in its own dtype (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


class Float32Muon(torch.optim.Muon):
    """torch's Muon with `match_rms_adamw` and matrix products in float32."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            parameters: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, buffer in zip(parameters, gradients, momenta, strict=True):
                buffer.lerp_(gradient, 1 - momentum)
                update = gradient.lerp(buffer, momentum).float()  # Nesterov's
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * lr * max(parameter.shape) ** 0.5)


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface, whose `param_groups` are those of both, so that schedulers change both."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], other_parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
    ):
        matrices = list(matrices)
        muon = torch.optim.Muon if fastest_dtype(matrices[0].device.type) == BFLOAT16 else Float32Muon
        self.parts = [
            muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(list(other_parameters), lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        # schedulers must change the groups of both parts, so the group objects are shared
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Returns `adamw`, or `muon` for the blocks' matrices with AdamW for the rest, over the parameters that need a gradient."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = block_index_of_parameters(model)
    is_matrix = {n: p.ndim == 2 and n in inside for n, p in named}
    matrices = [p for n, p in named if is_matrix[n]]
    other_parameters = [p for n, p in named if not is_matrix[n]]
    if name == "muon" and matrices and other_parameters:
        return MuonAdamW(matrices, other_parameters, lr, weight_decay)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))
