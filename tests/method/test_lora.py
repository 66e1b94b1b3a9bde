"""LoRA recovery: it trains, it merges, and on a pruned model every zero stays."""

from __future__ import annotations

import torch

from winnow.method.lora import Lora
from winnow.method.prune import Wanda
from winnow.model.load import pretrained
from winnow.model.packing import linears


def test_zeros_survive_and_the_loss_falls(tiny, run_in) -> None:
    pruned = Wanda(pattern="2:4")(pretrained(str(tiny)), run_in)
    masks = {n: m.weight.data != 0 for n, m in linears(pruned.model).items()}
    before = {n: m.weight.data.clone() for n, m in linears(pruned.model).items()}
    first = Lora(rank=8, steps=2, tokens_per_batch=512, learning_rate=0.02)(pretrained(str(tiny)), run_in)
    recovered = Lora(rank=8, steps=40, tokens_per_batch=512, learning_rate=0.02)(pruned, run_in)
    assert recovered.manifest["_notes"]["loss"] < first.manifest["_notes"]["loss"] - 0.1
    for name, linear in linears(recovered.model).items():
        assert torch.equal(linear.weight != 0, masks[name]), name
        assert not torch.equal(linear.weight, before[name]), name
    assert recovered.model.dtype == torch.bfloat16
    assert not any("lora" in name for name, _ in recovered.model.named_parameters())


def test_the_masked_layer_is_the_masked_update(tiny, run_in) -> None:
    """Against the plain reference: base weight plus mask times scaled B A, as a dense layer."""
    import peft

    from winnow.method.lora import mask_zeros

    base = Wanda(0.5)(pretrained(str(tiny)), run_in).model.float()
    names = sorted(linears(base))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    masks = mask_zeros(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 64)
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = layer.base_layer.weight + masks["model.layers.0.mlp.up_proj"] * update
    torch.testing.assert_close(layer(x), x @ weight.T)
