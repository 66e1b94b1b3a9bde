"""LoRA recovery: low-rank updates that win back accuracy, merged into the weights.

On a pruned model the update is masked while it trains and when it is merged, so that every zero stays exactly zero.

    python compress.py method=[wanda,lora] method.wanda.sparsity=0.6
    torchrun --nproc_per_node=2 train.py model=local model.path=FOLDER method=[lora] hardware=l40s_x2
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import knob
from winnow.method.trainable import Training
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

ALL = "all"
_LEAST_NORM = 1e-30  # of a row: what a length of 0 is divided by


@dataclass(frozen=True)
class Adapting(Training):
    """What stages that train low-rank updates share: their size, and the layers that get one."""

    rank: int = knob(16, choices=(4, 8, 16, 32, 64, 128, 256), searched=(4, 8, 16, 32, 64))
    learning_rate: float = knob(1e-3, low=1e-6, high=1e-1, log=True, search_range=(3e-4, 5e-3))
    alpha: float = knob(0.0, low=0.0, high=1e4, search=False)
    rslora: bool = knob(False, choices=(False, True), search=False)
    dora: bool = knob(False, choices=(False, True), search=False)
    targets: Any = ALL

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets != ALL:
            named = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            object.__setattr__(self, "targets", named)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("peft",)

    def targeted(self, plan: ModelLayout) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices that get an update, by the names of their layers.

        Raises:
            UserError: a target that is no linear layer of the model.
        """
        shapes = {name.removesuffix(".weight"): t.shape for name, t in plan.tensors.items() if t.linear}
        unknown = [target for target in self.targets if not any(is_meant(name, (target,)) for name in shapes)]
        if self.targets != ALL and unknown:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise UserError(
                f"{self.option}.targets: {', '.join(unknown)} is no linear layer of the blocks; there are {there}; "
                f"`all` takes them all"
            )
        return {name: shape for name, shape in shapes.items() if is_meant(name, self.targets)}

    def trained(self, plan: ModelLayout) -> int:
        """Weights of the updates."""
        return self.rank * sum(sum(shape) for shape in self.targeted(plan).values())


@dataclass(frozen=True)
class Lora(Adapting):
    """Trains rank-`rank` updates of linear layers on the calibration source's documents.

    Attributes:
        rank: of the update.
        alpha: it is multiplied by `alpha / rank` (by `alpha / sqrt(rank)` with `rslora`); 0: twice the rank.
        rslora: rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2).
        dora: the length of each row is trained apart from its direction (Liu et al. 2024, arXiv:2402.09353, eq. 5).
        targets: which linear layers of the blocks: `all`, or a list of their names, as [q_proj,v_proj].

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    Calibration: documents of the same source, as many as the steps need; the loss is on completions.
    Cost: 6 N operations a token and step; on the device the model as it is (in single precision with precision=32-true), 16
        bytes for each adapter weight, and a batch's activations (derived from the code).
    Writes: dense safetensors in the model's own type, the update merged.
    Loaded by: all that load the base model.
    """

    slot: ClassVar[Slot] = Slot.RECOVER
    shown_after: ClassVar[tuple[str, ...]] = ("wanda",)
    preload: ClassVar[tuple[str, ...]] = ("peft", "winnow.training.fit")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        self.targeted(plan)
        return plan

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        as_stored = self.precision_in(plan.compute_dtype) == "bf16-mixed" and plan.dtype == "bfloat16"
        return self.cost(plan, calibration, self.trained(plan), frozen=as_stored, masked=plan.sparse)

    def __call__(self, lm: LM, run: Run) -> LM:
        import torch

        from winnow.model.packing import cast_weights

        dtype = lm.model.dtype
        rows = self.encoded(lm, run)
        if self.precision_in(run.compute_dtype) == "32-true" or dtype != torch.bfloat16:
            cast_weights(
                lm.model, torch.float32
            )  # else frozen weights stay as they are: products are in bfloat16 anyway
        model = adapted(lm.model, self, run.seed)
        mask_zeros(model)
        fitted = self.train(model, rows, run, learning_rate=self.learning_rate)
        merged = merge(model)
        lm.manifest["_notes"] = {"training": fitted.record()}
        cast_weights(merged, dtype)
        return lm.changed(merged)


def adapted(model: Any, settings: Adapting, seed: int) -> Any:
    """`model` with fresh adapters in its linear layers, by PEFT; only they need a gradient."""
    import peft
    import torch
    from peft.utils import transformers_weight_conversion

    from winnow.model.layers import linears

    wanted = [name for name in sorted(linears(model)) if is_meant(name, settings.targets)]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    # PEFT takes names such as experts.0.w1 for those of an older transformers, and would look for stacked experts instead
    with mock.patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        made = peft.get_peft_model(model, config)
    if lost := sorted(set(wanted) - set(layers(made.base_model.model))):
        raise RuntimeError(f"PEFT gave no adapter to {', '.join(lost)}")
    if settings.dora:
        _keep_rows_of_zeros(made)
    return made


def rows_of_zeros(model: nn.Module) -> list[str]:
    """The layers with DoRA that have a row of zeros: it has no direction, and PEFT divides by its length."""
    found = {name: layer.lora_magnitude_vector["default"].weight for name, layer in layers(model).items()}
    return [name for name, lengths in found.items() if (lengths == 0).any()]


def _keep_rows_of_zeros(model: nn.Module) -> None:
    """Lets PEFT's DoRA leave a row of zeros as it is, where it would make NaN of it."""
    for layer in layers(model).values():
        vector = layer.lora_magnitude_vector["default"]
        vector.get_weight_norm = functools.partial(_least_norm, vector.get_weight_norm)


def _least_norm(norm: Any, *arguments: Any, **named: Any) -> torch.Tensor:
    found: torch.Tensor = norm(*arguments, **named)
    return found.clamp(min=_LEAST_NORM)


def is_meant(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a layer is one of `targets`, which give the last name or more of it."""
    return targets == ALL or any(f".{name}".endswith(f".{target}") for target in targets)


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers with an adapter, by their name in the base model."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def norm_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """Lengths [out] to divide the rows [out, in] by: a row of zeros stays one."""
    norms: torch.Tensor = weight.norm(dim=1).clamp(min=_LEAST_NORM)
    return norms


def effective(layer: Any) -> torch.Tensor:
    """The weight [out, in] that a layer with its adapter stands for: `W + mask * s B A`, rows scaled by DoRA."""
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
    mask = getattr(layer, "winnow_mask", None)
    weight = layer.base_layer.weight + (update if mask is None else mask * update)
    if layer.use_dora["default"]:
        norm = norm_of_rows(weight).detach()  # arXiv:2402.09353, section 4.3: a constant in the backward pass
        weight = weight * (layer.lora_magnitude_vector["default"].weight / norm)[:, None]
    return weight  # type: ignore[no-any-return]


def mask_zeros(model: nn.Module) -> None:
    """Makes every adapter over a pruned matrix train the update that will survive: `mask * (B A)`.

    The mask (1 where a weight may be other than zero) is kept with the layer; one with under 1 % of zeros counts as dense.
    Costs one product of the update, rank * in * out multiplications, a forward pass.
    """
    import types

    import torch.nn.functional as F

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.linear(x, effective(self).to(x.dtype), self.base_layer.bias)

    for layer in layers(model).values():
        mask = layer.base_layer.weight != 0
        if mask.float().mean() < 0.99:
            layer.register_buffer("winnow_mask", mask, persistent=False)
            layer.forward = types.MethodType(forward, layer)


def merge(model: Any) -> Any:
    """The base model with the adapters in its weights, and without PEFT's layers."""
    import torch

    with torch.no_grad():
        for layer in layers(model).values():
            weight = effective(layer)
            if hasattr(layer, "winnow_mask"):
                weight = weight.masked_fill(~layer.winnow_mask, 0.0)  # a product with 0 may be -0
            layer.base_layer.weight.copy_(weight)
    return model.unload()
