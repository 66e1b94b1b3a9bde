"""Whether methods can work on an architecture: refused before the work, so that none passes over a model in silence.

python compress.py model=local model.path=FOLDER method=[nf4] dry_run=true
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.types import Slot
from winnow.method.knobs import Stage
from winnow.model.holders import ANY, EXPERT, STACKED, TRANSPOSED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.layout import TensorLayout

REACHED = (
    0.75  # the least share of the blocks' weights that must lie in matrices; the rest are norms, convolutions, routers
)
_SAID = {
    EXPERT: "experts",
    STACKED: "experts that checkpoints have as one tensor",
    TRANSPOSED: "transposed matrices (Conv1D)",
}
_SAMPLES = 4096  # weights of each tensor that are looked at to see whether a stage has changed it


def check(stages: Mapping[str, Stage], tensors: Mapping[str, TensorLayout], architecture: str) -> None:
    """Refuses stages that would leave most of a model as it is, or whose format cannot hold it.

    Args:
        tensors: of the model, by name, as `winnow.estimate.layout` has them.

    Raises:
        UserError: the architecture holds its matrices in a way that a stage does not work on.
    """
    matrices = [t for t in tensors.values() if t.linear]
    of_blocks = sum(t.numel for t in tensors.values() if t.block is not None)
    share = sum(t.numel for t in matrices) / max(1, of_blocks)
    for name, stage in stages.items():
        known = getattr(stage, "matrices", None)
        if known is None:
            continue
        if share < REACHED and stage.slot != Slot.RECOVER:
            raise UserError(
                f"method={name}: {1 - share:.0%} of the weights in the blocks of {architecture} are no linear layers, nor experts "
                f"in a form that can be taken apart, and would stay as they are; take a method that looks at no matrix by "
                f"itself, such as depth or kv"
            )
        others = sorted({t.holder for t in matrices} - set(known)) if known != ANY else []
        if others:
            kinds = " and ".join(_SAID.get(kind, f"linear layers of a class of its own ({kind})") for kind in others)
            raise UserError(
                f"method={name}: its format does not hold {kinds}, as {architecture} has; "
                f"docs/architectures.md says which methods suit which architecture"
            )


def sample(model: nn.Module) -> dict[str, torch.Tensor]:
    """Some weights of each tensor, by name: what `check_changed` compares."""
    return {n: p.detach().flatten()[:: max(1, p.numel() // _SAMPLES)].clone() for n, p in model.named_parameters()}


def check_changed(name: str, before: Mapping[str, torch.Tensor], model: Any) -> None:
    """Refuses what a stage that should have changed weights has left as it was.

    Raises:
        UserError: no weight is another.
    """
    import torch

    after = sample(model)
    if before.keys() == after.keys() and all(
        before[n].dtype == after[n].dtype and torch.equal(before[n], after[n].to(before[n].device)) for n in before
    ):
        raise UserError(
            f"method={name} has changed no weight of {type(model).__name__}: its settings are too weak to show in the type of "
            f"the weights, or it does not suit the architecture; change method.{name}, or take another method"
        )
