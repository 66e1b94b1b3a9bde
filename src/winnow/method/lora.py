"""LoRA recovery trains low-rank updates that recover accuracy, and merges them into the weights.

On a pruned model the update is masked during training and merging, so that every zero stays exactly zero.

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
from winnow.method.knobs import StageResult, knob
from winnow.method.trainable import Training
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

ALL = "all"
_MIN_NORM = 1e-30  # lower bound of a row's length, which is a divisor


@dataclass(frozen=True)
class Adapting(Training):
    """Base of the stages that train low-rank updates: the size of the updates, and the layers that get one."""

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

    def target_shapes(self, plan: ModelLayout) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the matrices that get an update, by the names of their layers.

        Raises:
            UserError: a target that is no linear layer of the model.
        """
        shapes = {name.removesuffix(".weight"): t.shape for name, t in plan.tensors.items() if t.linear}
        unknown = [target for target in self.targets if not any(is_targeted(name, (target,)) for name in shapes)]
        if self.targets != ALL and unknown:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise UserError(
                f"{self.option}.targets: {', '.join(unknown)} is no linear layer of the blocks; there are {available}; "
                f"`all` takes them all"
            )
        return {name: shape for name, shape in shapes.items() if is_targeted(name, self.targets)}

    def trained_parameters(self, plan: ModelLayout) -> int:
        """Returns the number of weights of the updates."""
        return self.rank * sum(sum(shape) for shape in self.target_shapes(plan).values())


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
    measured_after: ClassVar[tuple[str, ...]] = ("wanda",)
    preload: ClassVar[tuple[str, ...]] = ("peft", "winnow.training.fit")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        self.target_shapes(plan)
        return plan

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        as_stored = self.precision_in(plan.compute_dtype) == "bf16-mixed" and plan.dtype == "bfloat16"
        return self.cost(plan, calibration, self.trained_parameters(plan), frozen=as_stored, masked=plan.sparse)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        import torch

        from winnow.model.packing import cast_weights

        dtype = lm.model.dtype
        rows = self.encode_documents(lm, run)
        if self.precision_in(run.compute_dtype) == "32-true" or dtype != torch.bfloat16:
            # otherwise frozen weights keep their type: products are in bfloat16 anyway
            cast_weights(lm.model, torch.float32)
        model = add_adapters(lm.model, self, run.seed)
        mask_zeros(model)
        fitted = self.train(model, rows, run, learning_rate=self.learning_rate)
        merged = merge(model)
        cast_weights(merged, dtype)
        return StageResult(lm.with_model(merged), {"training": fitted.record()})


def add_adapters(model: Any, settings: Adapting, seed: int) -> Any:
    """Adds new PEFT adapters to the linear layers of `model`; only the adapters need a gradient."""
    import peft
    import torch
    from peft.utils import transformers_weight_conversion

    from winnow.model.layers import linears

    targets = [name for name in sorted(linears(model)) if is_targeted(name, settings.targets)]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    # PEFT mistakes names such as experts.0.w1 for those of an older transformers, and would look for stacked experts
    with mock.patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        peft_model = peft.get_peft_model(model, config)
    if missing := sorted(set(targets) - set(layers(peft_model.base_model.model))):
        raise RuntimeError(f"PEFT gave no adapter to {', '.join(missing)}")
    if settings.dora:
        _keep_rows_of_zeros(peft_model)
    return peft_model


def rows_of_zeros(model: nn.Module) -> list[str]:
    """Returns the DoRA layers that have a row of zeros, which has no direction: PEFT divides by its length."""
    row_lengths = {name: layer.lora_magnitude_vector["default"].weight for name, layer in layers(model).items()}
    return [name for name, lengths in row_lengths.items() if (lengths == 0).any()]


def _keep_rows_of_zeros(model: nn.Module) -> None:
    """Makes PEFT's DoRA leave a row of zeros unchanged; otherwise the row becomes NaN."""
    for layer in layers(model).values():
        vector = layer.lora_magnitude_vector["default"]
        vector.get_weight_norm = functools.partial(_clamped_norm, vector.get_weight_norm)


def _clamped_norm(norm: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    lengths: torch.Tensor = norm(*arguments, **keywords)
    return lengths.clamp(min=_MIN_NORM)


def is_targeted(name: str, targets: str | Sequence[str]) -> bool:
    """Returns whether a layer is one of `targets`, each of which is the end of a layer's dotted name."""
    return targets == ALL or any(f".{name}".endswith(f".{target}") for target in targets)


def layers(model: nn.Module) -> dict[str, Any]:
    """Returns PEFT's layers with an adapter, by their name in the base model."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def norm_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns the lengths [out] of the rows [out, in], clamped so that dividing a row of zeros by its length keeps the zeros."""
    norms: torch.Tensor = weight.norm(dim=1).clamp(min=_MIN_NORM)
    return norms


def effective_weight(layer: Any) -> torch.Tensor:
    """Returns the weight [out, in] of a layer with its adapter: `W + mask * s B A`, rows scaled by DoRA."""
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
    mask = getattr(layer, "winnow_mask", None)
    weight = layer.base_layer.weight + (update if mask is None else mask * update)
    if layer.use_dora["default"]:
        norm = norm_of_rows(weight).detach()  # arXiv:2402.09353, section 4.3: a constant in the backward pass
        weight = weight * (layer.lora_magnitude_vector["default"].weight / norm)[:, None]
    return weight  # type: ignore[no-any-return]


def mask_zeros(model: nn.Module) -> None:
    """Masks the update of every adapter on a pruned matrix, so that training sees what merging keeps: `mask * (B A)`.

    The mask (1 where a weight may be nonzero) is stored with the layer; a matrix with under 1 % of zeros counts as dense.
    Each forward pass costs one more product of the update, rank * in * out multiplications.
    """
    import types

    import torch.nn.functional as F

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.linear(x, effective_weight(self).to(x.dtype), self.base_layer.bias)

    for layer in layers(model).values():
        mask = layer.base_layer.weight != 0
        if mask.float().mean() < 0.99:
            layer.register_buffer("winnow_mask", mask, persistent=False)
            layer.forward = types.MethodType(forward, layer)


def merge(model: Any) -> Any:
    """Merges the adapters into the weights and returns the base model without PEFT's layers."""
    import torch

    with torch.no_grad():
        for layer in layers(model).values():
            weight = effective_weight(layer)
            if hasattr(layer, "winnow_mask"):
                weight = weight.masked_fill(~layer.winnow_mask, 0.0)  # a product with 0 may be -0
            layer.base_layer.weight.copy_(weight)
    return model.unload()
