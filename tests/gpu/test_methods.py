"""Every method on a CUDA device: it runs there, what it saves is loaded back there, works, and is as good as on a CPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from tests.method.test_conformance import CLASSES, METHODS, QUANTIZERS, perplexity, stage_of
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.knobs import Stage
from winnow.model import manifest
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS

DEVICE = "cuda"


def made(folder: Path, **stages: Stage) -> dict:
    """The manifest of the embedded model's artifact in `folder`/artifact, made on the device."""
    (folder / "run").mkdir(parents=True)
    calibration = Calibration(samples=64, max_length=128)
    run = Run(folder / "run", device=DEVICE, calibration=calibration)
    torch.cuda.reset_peak_memory_stats()
    return pipeline.compress(pretrained(str(WEIGHTS)), stages, run, folder / "artifact").manifest


def on_device(folder: Path) -> LM:
    return pretrained(str(folder), device=DEVICE)


@torch.inference_mode()
def loss_on_device(lm: LM) -> float:
    """Of the first held-out texts, through the device."""
    from winnow.nano.items import held_out_text

    loss, tokens = 0.0, 0
    for item in held_out_text(100):
        ids = lm.tokenizer([item.completion], return_tensors="pt").input_ids.to(DEVICE)
        scores = lm.model(input_ids=ids).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return loss / tokens


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_there_and_what_it_saves_works_there(name: str, tmp_path: Path) -> None:
    if name == "gguf":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'winnow[gguf]'")
    written = made(tmp_path, **{name: stage_of(name)})
    assert written == manifest.read(tmp_path / "artifact")
    assert any("fails" not in version for version in written["runtimes"].values()), written["runtimes"]
    if name == "gguf":
        return
    base = perplexity(pretrained(str(WEIGHTS)))
    assert math.exp(loss_on_device(on_device(tmp_path / "artifact"))) <= CLASSES[name].perplexity_bound * base


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "gguf"])
def test_patterns_survive_quantization_there(name: str, tmp_path: Path) -> None:
    made(tmp_path, wanda=CLASSES["wanda"](pattern="2:4"), **{name: stage_of(name)})
    from winnow.model.layers import linears

    model = on_device(tmp_path / "artifact").model
    pruned = made(tmp_path / "pruned", wanda=CLASSES["wanda"](pattern="2:4"))
    assert pruned["stages"][0]["method"] == "wanda"
    for layer, linear in linears(pretrained(str(tmp_path / "pruned" / "artifact")).model).items():
        zeros = (linear.weight == 0).to(DEVICE)
        assert zeros.unflatten(-1, (-1, 4)).sum(-1).eq(2).all(), layer
        module = model.get_submodule(layer)
        with torch.inference_mode():
            eye = torch.eye(linear.in_features, dtype=model.dtype, device=DEVICE)
            weight = (module(eye) - module(torch.zeros_like(eye[:1]))).T
        assert (weight[zeros] == 0).all(), layer


def test_what_comes_out_is_what_a_cpu_makes_of_it(tmp_path: Path) -> None:
    # no calibration in it, so that the two devices must choose the same integers
    (tmp_path / "cpu").mkdir()
    on_cpu = Run(tmp_path / "cpu")
    pipeline.compress(pretrained(str(WEIGHTS)), {"rtn": stage_of("rtn")}, on_cpu, tmp_path / "cpu" / "artifact")
    made(tmp_path / "gpu", rtn=stage_of("rtn"))
    first, second = (pretrained(str(tmp_path / device / "artifact")) for device in ("cpu", "gpu"))
    assert perplexity(first) == pytest.approx(perplexity(second), rel=1e-3)


def test_a_walk_keeps_few_blocks_on_the_device(tmp_path: Path) -> None:
    """The weights of the model are larger than what `wanda` may hold: two blocks beside the embeddings."""
    from tests.method.shapes import random_model

    base = random_model("llama", tmp_path / "base", num_hidden_layers=24, hidden_size=512, intermediate_size=2048)
    (tmp_path / "run").mkdir()
    calibration = Calibration(samples=8, max_length=64)
    run = Run(tmp_path / "run", device=DEVICE, calibration=calibration)
    lm = pretrained(str(base))
    block_bytes = sum(p.nbytes for p in lm.model.model.layers[0].parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    CLASSES["wanda"](sparsity=0.5)(lm, run)
    assert (
        torch.cuda.max_memory_allocated() - before < 12 * block_bytes
    )  # 24 are in the model; sums and activations count


def test_depth_and_rtn_together(tmp_path: Path) -> None:
    written = made(tmp_path, depth=stage_of("depth"), rtn=dataclasses.replace(stage_of("rtn"), bits=8))
    assert [stage["method"] for stage in written["stages"]] == ["depth", "rtn"]
    assert math.isfinite(loss_on_device(on_device(tmp_path / "artifact")))
