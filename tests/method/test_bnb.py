"""bitsandbytes: what it writes, how large that is, and the library's silent failures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.method.shapes import random_model
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.bnb import FP4, NF4, Int8
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

bitsandbytes = pytest.importorskip("bitsandbytes")
METHODS: dict[str, Any] = {"int8": Int8, "nf4": NF4, "fp4": FP4}
IDS = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 90]])


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its faster kernel rounds differently
            module.support_avx512bf16_for_cpu = False
    return lm.model(input_ids=IDS).logits.float()


def four_bit_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["nano", "qwen2"])
def test_bytes_are_as_predicted(name: str, family: str, tmp_path: Path, run_in: Run) -> None:
    base = WEIGHTS if family == "nano" else random_model(family, tmp_path / "base")
    made = pipeline.compress(pretrained(str(base)), {name: METHODS[name]()}, run_in, tmp_path / "artifact")
    plan = METHODS[name]().predict(layout_of(pretrained(str(base))))
    assert plan.disk_bytes == pytest.approx(
        made.manifest["sizes"]["size_bytes"], rel=0.005 if family == "nano" else 0.03
    )


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_as_predicted(name: str, run_in: Run) -> None:
    base = pretrained(str(WEIGHTS))
    plan = METHODS[name]().predict(layout_of(base))
    model: Any = METHODS[name]()(base, run_in).lm.model
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if name == "int8" and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            held += module.weight.SCB.numel() * 4
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            held += sum(t.numel() * t.element_size() for t in tensors)
    assert plan.memory_bytes == pytest.approx(held, rel=0.001)


@pytest.mark.parametrize("name", METHODS)
def test_single_precision_becomes_half(name: str, tmp_path: Path, tiny: Path, run_in: Run) -> None:
    base = pretrained(str(tiny), dtype="float32")
    plan = METHODS[name]().predict(layout_of(base))
    made = METHODS[name]()(base, run_in).lm
    assert made.model.dtype == torch.bfloat16
    saved = save(made, tmp_path / "artifact")
    assert plan.disk_bytes == pytest.approx(saved.manifest["sizes"]["size_bytes"], rel=0.03)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_an_artifact_saved_after_a_forward_pass_is_whole(name: str, tmp_path: Path, tiny: Path, run_in: Run) -> None:
    """A forward pass may repack 4-bit weights for the processor, after which both the file and the model are wrong."""
    made = METHODS[name]()(pretrained(str(tiny)), run_in).lm
    with torch.no_grad():
        before = made.model(input_ids=IDS).logits.float()
    for layer in four_bit_layers(made.model):
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    save(made, tmp_path / "artifact")
    torch.testing.assert_close(logits(pretrained(str(tmp_path / "artifact"))), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(made), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_gradients_still_flow_after_an_evaluation(name: str, tiny: Path, run_in: Run) -> None:
    """The repacked product has no gradient: adapters below a layer would train nothing, with a warning at most."""
    model: Any = METHODS[name]()(pretrained(str(tiny)), run_in).lm.model
    with torch.no_grad():
        model(input_ids=IDS)
    layers = four_bit_layers(model)
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    x = torch.randn(1, 4, layers[0].in_features, dtype=torch.bfloat16, requires_grad=True)
    layers[0](x).float().square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_int8_does_not_remark_on_every_layer_and_forward(
    tiny: Path, run_in: Run, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    made = Int8()(pretrained(str(tiny)), run_in).lm
    with caplog.at_level(logging.INFO):
        logits(made)
    assert not [r for r in caplog.records if r.name.startswith("bitsandbytes")]
    assert not [w for w in recwarn if "MatMul8bitLt" in str(w.message)]


def test_fp4_differs_from_nf4(tiny: Path, run_in: Run) -> None:
    kinds = {
        name: four_bit_layers(METHODS[name]()(pretrained(str(tiny)), run_in).lm.model)[0] for name in ("nf4", "fp4")
    }
    assert {name: layer.weight.quant_state.quant_type for name, layer in kinds.items()} == {"nf4": "nf4", "fp4": "fp4"}
    assert all(layer.weight.quant_state.nested for layer in kinds.values())
