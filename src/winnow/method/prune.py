"""Pruning single weights: by magnitude, and by magnitude times activation (Wanda; Sun et al. 2023, arXiv:2306.11695).

Patterns: unstructured at any sparsity, or N:M (N zeros of every M consecutive inputs), which sparse kernels can use. The saved
weights are dense tensors with zeros in them: smaller only together with a method or a server that makes use of the zeros.

    python compress.py method=[wanda] method.wanda.sparsity=0.5
    python compress.py method=[wanda] method.wanda.pattern=2:4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from winnow.types import LM, Checked, Run, Slot, UserError, knob

if TYPE_CHECKING:
    import torch
    from torch import nn

PATTERNS = ("unstructured", "2:4", "4:8")


@dataclass(frozen=True)
class _Pruning(Checked):
    slot: ClassVar[Slot] = Slot.PRUNE

    sparsity: float = knob(0.5, low=0.0, high=0.95, when={"pattern": "unstructured"}, search_range=(0.1, 0.7))
    pattern: str = knob("unstructured", choices=PATTERNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            name = type(self).__name__.lower()
            raise UserError(
                f"method.{name}.sparsity={self.sparsity} clashes with method.{name}.pattern={self.pattern}, which zeroes "
                f"half of the weights; leave sparsity at 0.5 or take pattern=unstructured"
            )


@dataclass(frozen=True)
class Magnitude(_Pruning):
    """Zeroes the smallest weights of each matrix (unstructured) or of each group of M inputs (N:M)."""

    def __call__(self, lm: LM, run: Run) -> LM:
        import torch

        from winnow.model.packing import linears

        for linear in linears(lm.model).values():
            weight = linear.weight.data
            if self.pattern == "unstructured":  # one threshold a matrix, as Han et al. 2015 (arXiv:1506.02626)
                mask = smallest(weight.abs().flatten()[None], self.sparsity).view_as(weight)
            else:
                mask = smallest_of_pattern(weight.abs(), self.pattern)
            weight.masked_fill_(mask, torch.zeros((), dtype=weight.dtype))
        return lm.changed(lm.model)


@dataclass(frozen=True)
class Wanda(_Pruning):
    """Zeroes, in each output row, the weights with the smallest |weight| x norm of its input (eq. 1), block by block."""

    def __call__(self, lm: LM, run: Run) -> LM:
        from winnow.method.blocks import decoder_blocks, walk_blocks
        from winnow.model.calibration import calibration_batches

        batches, digest = calibration_batches(lm, run)
        count = len(decoder_blocks(lm.model))
        for index, block, replay in walk_blocks(lm.model, batches, run.device):
            with _input_norms(block) as norms:
                replay()
            for linear, norm_i in norms.items():
                score = linear.weight.data.abs().float() * norm_i
                if self.pattern == "unstructured":  # compared within each output, section 3
                    mask = smallest(score, self.sparsity)
                else:
                    mask = smallest_of_pattern(score, self.pattern)
                linear.weight.data.masked_fill_(mask, 0)
            run.log(f"wanda: block {index + 1} of {count}")
        lm.manifest["_notes"] = {"calibration_sha256": digest}
        return lm.changed(lm.model)


class _input_norms:  # noqa: N801 (a context manager, used like a function)
    """Collects, for every linear layer of a block, the L2 norm of each input feature over all tokens seen."""

    def __init__(self, block: nn.Module) -> None:
        from torch import nn

        self.linears = [m for m in block.modules() if isinstance(m, nn.Linear)]

    def __enter__(self) -> dict[nn.Linear, torch.Tensor]:
        import torch

        self.squares = {m: torch.zeros(m.in_features, device=m.weight.device) for m in self.linears}
        self.norms: dict[nn.Linear, torch.Tensor] = {}

        def add(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().float().flatten(0, -2)  # [tokens, in]
            self.squares[module] += x.square().sum(0)

        self.handles = [m.register_forward_pre_hook(add) for m in self.linears]
        return self.norms

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.norms.update({m: s.sqrt() for m, s in self.squares.items()})


def smallest(score_oi: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mask [out, in] of the `sparsity` share of each row with the smallest scores."""
    import torch

    count = round(score_oi.shape[-1] * sparsity)
    mask = torch.zeros_like(score_oi, dtype=torch.bool)
    if count:
        mask.scatter_(-1, score_oi.argsort(dim=-1, stable=True)[..., :count], True)
    return mask


def smallest_of_pattern(score_oi: torch.Tensor, pattern: str) -> torch.Tensor:
    """Mask [out, in] of the N smallest scores of every M consecutive inputs, for `pattern` "N:M".

    Raises:
        UserError: M does not divide the number of inputs.
    """
    zeros, group = (int(part) for part in pattern.split(":"))
    if score_oi.shape[-1] % group:
        raise UserError(f"pattern={pattern} needs widths that are multiples of {group}, not {score_oi.shape[-1]}")
    return smallest(score_oi.unflatten(-1, (-1, group)), zeros / group).flatten(-2)
