"""Checks that methods suit an architecture, before they run, and that a method has changed the weights, after it has run.

python compress.py model=local model.path=FOLDER method=[nf4] dry_run=true
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.types import Slot
from winnow.method.knobs import Stage
from winnow.model.matrix_kinds import ANY, EXPERT, STACKED, TRANSPOSED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.layout import TensorLayout

# smallest share of the blocks' weights that must be in matrices; other weights are norms, convolutions, routers
MIN_MATRIX_SHARE = 0.75
_DESCRIPTIONS = {
    EXPERT: "experts",
    STACKED: "experts that checkpoints have as one tensor",
    TRANSPOSED: "transposed matrices (Conv1D)",
}
_SAMPLES = 4096  # weights of each tensor that are compared before and after a stage


def check(stages: Mapping[str, Stage], tensors: Mapping[str, TensorLayout], architecture: str) -> None:
    """Refuses stages that would leave most of a model unchanged, or whose format cannot store it.

    Args:
        tensors: the model's tensors by name, from `winnow.estimate.layout`.

    Raises:
        UserError: the architecture has kinds of matrices that a stage does not work on.
    """
    matrices = [t for t in tensors.values() if t.linear]
    block_weights = sum(t.numel for t in tensors.values() if t.block is not None)
    share = sum(t.numel for t in matrices) / max(1, block_weights)
    for name, stage in stages.items():
        supported = getattr(stage, "matrices", None)
        if supported is None:
            continue
        if share < MIN_MATRIX_SHARE and stage.slot != Slot.RECOVER:
            raise UserError(
                f"method={name}: {1 - share:.0%} of the weights in the blocks of {architecture} are no linear layers, nor experts "
                f"in a form that can be taken apart, and would stay as they are; take a method that looks at no matrix by "
                f"itself, such as depth or kv"
            )
        unsupported = sorted({t.matrix_kind for t in matrices} - set(supported)) if supported != ANY else []
        if unsupported:
            kinds = " and ".join(
                _DESCRIPTIONS.get(kind, f"linear layers of a class of its own ({kind})") for kind in unsupported
            )
            raise UserError(
                f"method={name}: its format does not hold {kinds}, as {architecture} has; "
                f"docs/architectures.md says which methods suit which architecture"
            )


def sample(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns some weights of each tensor by name, for `check_changed` to compare."""
    return {n: p.detach().flatten()[:: max(1, p.numel() // _SAMPLES)].clone() for n, p in model.named_parameters()}


def check_changed(name: str, before: Mapping[str, torch.Tensor], model: Any) -> None:
    """Refuses the result of a stage that should have changed weights, but changed none.

    Raises:
        UserError: no weight has changed.
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
