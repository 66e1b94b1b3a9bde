"""LoRA recovery (Hu et al. 2021, arXiv:2106.09685): low-rank updates that win back accuracy, merged into the weights.

On a pruned model the update is masked while it trains and when it is merged, so that every zero stays exactly zero.

    python compress.py method=[wanda,lora] method.wanda.sparsity=0.6
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.types import LM, Calibration, Checked, MissingExtra, Run, Slot, knob

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.hardware.work import Work
    from winnow.model.plan import Plan


@dataclass(frozen=True)
class Lora(Checked):
    """Trains rank-`rank` updates of every linear layer of the blocks on the calibration source's documents.

    Attributes:
        rank: of the update; `alpha` = 2 * `rank`.
        steps: optimizer steps of about `tokens_per_batch` tokens each.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    Calibration: documents of the same source, as many as the steps need; the loss is on completions.
    Cost: 6 N operations a token and step; on the device the model in single precision, 12 bytes for each adapter weight, and
        a batch's activations (derived from the code).
    Writes: dense safetensors in the model's own type, the update merged.
    Loaded by: all that load the base model.
    """

    slot: ClassVar[Slot] = Slot.RECOVER
    preload: ClassVar[tuple[str, ...]] = ("peft", "winnow.recovery.fit")

    rank: int = knob(16, choices=(4, 8, 16, 32, 64))
    learning_rate: float = knob(1e-3, low=1e-6, high=1e-1, log=True, search_range=(3e-4, 5e-3))
    steps: int = knob(100, low=1, high=1_000_000, search=False)
    tokens_per_batch: int = knob(2048, low=32, high=10_000_000, search=False)
    max_length: int = knob(512, low=8, high=1_000_000, search=False)
    precision: str = knob("bf16-mixed", choices=("32-true", "bf16-mixed"), search=False)

    def work(self, plan: Plan, calibration: Calibration) -> Work:
        from winnow.hardware.work import Work

        trained = self.rank * sum(sum(t.shape) for t in plan.linears)
        mixed = self.precision == "bf16-mixed"
        return Work.trained(plan, calibration, self.steps, self.tokens_per_batch, trained, self._documents, mixed)

    @property
    def _documents(self) -> int:
        """Four times what the steps need at the calibration length, so that a document is seen once."""
        return max(64, self.steps * self.tokens_per_batch // 16)

    def __call__(self, lm: LM, run: Run) -> LM:
        try:
            import peft
        except ImportError:
            raise MissingExtra("peft", "peft") from None
        import torch

        from winnow.model.packing import cast_weights, linears
        from winnow.recovery.corpus import documents
        from winnow.recovery.data import Documents, encode
        from winnow.recovery.fit import fit
        from winnow.recovery.module import Schedule

        rows = encode(documents(run.calibration, self._documents, run.seed), lm.tokenizer, self.max_length)
        torch.manual_seed(run.seed)  # the adapters' initial weights
        dtype = lm.model.dtype
        adapter = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=sorted(linears(lm.model)),
            task_type="CAUSAL_LM",
        )
        cast_weights(lm.model, torch.float32)
        model = peft.get_peft_model(lm.model, adapter)
        masks = mask_zeros(model)
        data = Documents(rows, lm.tokenizer.pad_token_id, self.tokens_per_batch, run.seed)
        schedule = Schedule(self.learning_rate, self.steps, warmup=0.05, weight_decay=0.0)
        loss = fit(model, data, schedule, run, precision=self.precision)
        run.log(f"lora: loss {loss:.4f} over the last tenth of {self.steps} steps")
        merged: Any = model.merge_and_unload()
        for name, linear in linears(merged).items():
            if name in masks:
                linear.weight.data.mul_(masks[name])
        lm.manifest["_notes"] = {"loss": loss}
        cast_weights(merged, dtype)
        return lm.changed(merged)


def mask_zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Makes every LoRA layer over a pruned matrix train the update that will survive: `mask * (B A)`.

    Returns the masks (1 where a weight may be other than zero) by the layer's name in the base model; layers with under 1 %
    of zeros count as dense. Costs one product of the update, rank * in * out multiplications, a forward pass.
    """
    import types

    import torch.nn.functional as F
    from peft.tuners.lora import Linear

    masks: dict[str, torch.Tensor] = {}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        weight = self.base_layer.weight + self.winnow_mask * ((up @ down) * self.scaling["default"])
        return F.linear(x, weight, self.base_layer.bias)

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            mask = (module.base_layer.weight != 0).to(module.base_layer.weight.dtype)
            if mask.mean() < 0.99:
                module.winnow_mask = mask
                module.forward = types.MethodType(forward, module)
                masks[name.removeprefix("base_model.model.")] = mask
    return masks
