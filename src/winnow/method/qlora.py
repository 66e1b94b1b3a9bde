"""QLoRA trains low-rank updates on quantized, frozen weights; the artifact has the adapter beside the weights.

python compress.py method=[wanda,qlora]
python compress.py method=[qlora] model=local model.path=NF4_ARTIFACT
torchrun --nproc_per_node=2 train.py method=[qlora] model=local model.path=FOLDER hardware=l40s_x2
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import StageResult, knob
from winnow.method.lora import Adapting
from winnow.model.lm import LM
from winnow.model.matrix_kinds import LINEAR, TRANSPOSED

if TYPE_CHECKING:
    import torch

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout


@dataclass(frozen=True)
class QLoRA(Adapting):
    """Trains rank-`rank` updates of the linear layers of a model whose weights are quantized by bitsandbytes and frozen. A
    dense model is quantized to NF4 first; after `nf4`, `fp4` or `int8`, and on their artifacts, the weights stay as they are.

    The adapters train in single precision and are stored in 16 bits; everything else stays as it was. The update is dense:
    it fills the zeros of a pruned model (`lora` keeps them).

    Attributes:
        rank, alpha, rslora, dora, targets: as for `lora`.
        merge: add the update to the weights and save a dense model in 16 bits, instead of an adapter beside the quantized one.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    Calibration: documents of the same source, as many as the steps need; the loss is on completions.
    Cost: 6 N operations a token and step, and every weight unpacked twice; on the device the quantized model, 16 bytes for
        each adapter weight, and a batch's activations (derived from the code).
    Writes: safetensors, bitsandbytes' 4-bit layout, and `adapter/` in PEFT's format; dense safetensors with `merge`.
    Loaded by: transformers with bitsandbytes and PEFT; with `merge` all that load the base model.
    """

    slot: ClassVar[Slot] = Slot.ADAPT
    matrices: ClassVar[tuple[str, ...] | None] = (LINEAR, TRANSPOSED)
    preload: ClassVar[tuple[str, ...]] = ("bitsandbytes", "peft", "winnow.training.fit")
    perplexity_bound: ClassVar[float] = 1.02

    merge: bool = knob(False, choices=(False, True), search=False)

    @property
    def leaves_adapter(self) -> bool:
        return not self.merge

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("bitsandbytes", "peft")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        from winnow.estimate.layout import TensorLayout, dense_tensors
        from winnow.model.adapter import CONFIG_BYTES

        if plan.layout not in ("", "4bit", "int8"):
            raise UserError(
                f"method=[...,qlora] trains on weights in bitsandbytes' layouts, and those of this model are packed by "
                f"{plan.layout}; write method=[nf4,qlora], or train before they are quantized: method=[lora,...]"
            )
        if self.dora and plan.layout == "int8":
            raise UserError(
                "method.qlora.dora=true loses the scales of 8-bit weights in PEFT; set method.qlora.dora=false, or write "
                "method=[nf4,qlora]"
            )
        if self.merge:
            return dataclasses.replace(plan.in_16_bits(), layout="", tensors=dense_tensors(plan.in_16_bits().config))
        base = self._quantized(plan)
        tensors, names = dict(base.tensors), 0
        for name, shape in self.target_shapes(plan).items():
            weights = self.rank * sum(shape)
            magnitudes = shape[0] if self.dora else 0
            size = 2 * weights + 4 * magnitudes
            # adapters load in single precision; 160 bytes: PEFT's full names of the tensors
            tensors[f"adapter.{name}"] = TensorLayout(
                (weights + magnitudes,), size + 160, 4 * (weights + magnitudes), entries=3 if self.dora else 2
            )
            names += len(name)
        return dataclasses.replace(base, tensors=tensors, other_bytes=base.other_bytes + CONFIG_BYTES + names)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.method.bnb import NF4

        training = self.cost(self._quantized(plan), calibration, self.trained_parameters(plan), frozen=True)
        return NF4().work(plan, calibration).then(training) if is_dense(plan) else training

    def _quantized(self, plan: ModelLayout) -> ModelLayout:
        from winnow.method.bnb import NF4

        return NF4().predict(plan) if is_dense(plan) else plan

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.method import bnb
        from winnow.method.lora import add_adapters, rows_of_zeros
        from winnow.model import adapter
        from winnow.model.save import attach_adapter

        adapter.check_no_adapter(lm.model, lm.path or lm.name, "qlora")
        if getattr(lm.model.config, "quantization_config", None) is None:
            lm = bnb.NF4()(lm, run).lm
        bnb.keep_packing(lm.model)
        model = add_adapters(lm.model, self, run.seed)
        with_zero_rows = rows_of_zeros(model) if self.dora else []
        if with_zero_rows and not self.merge:  # loading the adapter with PEFT would give NaN
            raise UserError(
                f"method.qlora.dora=true cannot be saved beside a row of zeros, which {with_zero_rows[0]} has; set "
                f"method.qlora.dora=false, or method.qlora.merge=true"
            )
        with self.cast_frozen(model, run):
            adapter.check_gradients(model, "qlora")
            fitted = self.train(model, self.encode_documents(lm, run), run, learning_rate=self.learning_rate)
        adapter.round_matrices(model, lm.model.dtype)
        finished = lm.with_model(merge_adapter(model)) if self.merge else attach_adapter(lm, model)
        return StageResult(finished, {"training": fitted.record()})


def is_dense(plan: ModelLayout) -> bool:
    """Returns whether the linear weights are stored with 16 bits or more each."""
    return all(t.disk_bytes >= 2 * t.numel for t in plan.linears)


def merge_adapter(model: Any) -> Any:
    """Merges the adapter into the weights and returns the dense model, in the type that it computes in."""
    import torch

    from winnow.method.lora import layers
    from winnow.model.layers import linears
    from winnow.model.quiet import quiet

    with torch.no_grad(), quiet():
        weights = {name: _merged_weight(layer) for name, layer in layers(model).items()}
        dense = model.unload().dequantize()
        for name, linear in linears(dense).items():
            if name in weights:
                linear.weight.copy_(weights[name])
    return dense.eval()


def _merged_weight(layer: Any) -> torch.Tensor:
    """Returns `W + s B A` of a layer, rows scaled by DoRA, rounded to the type that the model computes in."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    from winnow.method.lora import norm_of_rows

    base = layer.get_base_layer()
    dense = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
    weight: torch.Tensor = dense.float() + layer.get_delta_weight("default").float()
    if layer.use_dora["default"]:
        weight = weight * (layer.lora_magnitude_vector["default"].weight / norm_of_rows(weight))[:, None]
    return weight.to(dense.dtype)
