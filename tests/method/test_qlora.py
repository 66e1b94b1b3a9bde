"""QLoRA: what it trains, what it leaves alone, and the adapter that lies beside the quantized files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.core.errors import MissingExtra, UserError
from winnow.core.types import Calibration
from winnow.estimate.layout import layout_of
from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.bnb import FP4, NF4, Int8
from winnow.method.kv import KV
from winnow.method.lora import layers
from winnow.method.qlora import QLoRA, merge_adapter
from winnow.method.rtn import RTN
from winnow.method.soft_prompt import SoftPrompt
from winnow.model import adapter, manifest
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.runtime import choose_runtime, installed_runtimes

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 90]])
QUICK: dict[str, Any] = {"rank": 4, "steps": 3, "tokens_per_batch": 128, "learning_rate": 0.02, "max_length": 64}


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm.model(input_ids=IDS).logits.float()


def run_of(folder: Path) -> Run:
    folder.mkdir()
    return Run(folder, calibration=Calibration(samples=16, max_length=64))


@pytest.fixture(scope="module")
def nf4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    pipeline.compress(pretrained(str(tiny)), {"nf4": NF4()}, run_of(folder / "run"), folder / "artifact")
    return folder / "artifact"


@pytest.fixture(scope="module")
def tuned(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with an adapter, made from an NF4 artifact on disk."""
    folder = tmp_path_factory.mktemp("tuned")
    stages = {"qlora": QLoRA(**QUICK)}
    pipeline.compress(pretrained(str(nf4)), stages, run_of(folder / "run"), folder / "artifact")
    return folder / "artifact"


DORA = {"dora": True, "rslora": True, "targets": ["q_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("quantizer", "knobs"), [(None, {}), (None, DORA), (FP4, {}), (Int8, {}), (Int8, DORA | {"dora": False})]
)
def test_only_the_adapter_is_trained_and_all_of_it(quantizer: Any, knobs: dict, tiny: Path, run_in: Run) -> None:
    lm = pretrained(str(tiny))
    lm = (quantizer or NF4)()(lm, run_in).lm
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    if quantizer is not Int8:
        with torch.no_grad():
            lm.model(input_ids=IDS)  # would repack what it can, if it was let: then nothing could be trained
    made = QLoRA(**{**QUICK, **knobs})(lm, run_in).lm
    found = layers(made.model)
    assert len(found) == (4 if knobs else 14)
    for name, layer in found.items():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.lora_B["default"].weight.any(), name
    base = adapter.without_adapter(made.model)
    assert {n for n, _ in base.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert base.dtype == torch.bfloat16


@pytest.mark.parametrize(("quantizer", "dora"), [(NF4, False), (NF4, True), (Int8, False)])
def test_merging_adds_the_update_to_the_weights(
    quantizer: Any, dora: bool, tiny: Path, tmp_path: Path, run_in: Run
) -> None:
    lm = quantizer()(pretrained(str(tiny)), run_in).lm
    made = QLoRA(**QUICK, dora=dora)(lm, run_in).lm
    before = logits(made)
    dense = lm.with_model(merge_adapter(made.model))
    assert not adapter.is_adapted(dense.model) and not hasattr(dense.model.config, "quantization_config")
    save(dense, tmp_path / "artifact")
    after = pretrained(str(tmp_path / "artifact"))
    assert after.model.dtype == torch.bfloat16
    assert all(type(m) is torch.nn.Linear for n, m in after.model.named_modules() if n.endswith("proj"))
    assert (logits(after) - before).abs().max() < 0.03 * before.abs().max()


def test_merge_is_a_setting(tiny: Path, tmp_path: Path, run_in: Run) -> None:
    stage = QLoRA(**QUICK, merge=True)
    made = pipeline.compress(pretrained(str(tiny)), {"qlora": stage}, run_in, tmp_path / "artifact")
    assert not (tmp_path / "artifact" / "adapter").exists()
    predicted = stage.predict(layout_of(pretrained(str(tiny)))).disk_bytes
    assert predicted == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.03)


def test_an_artifact_on_disk_keeps_its_files_and_gets_an_adapter(nf4: Path, tuned: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tuned / name).read_bytes() == (nf4 / name).read_bytes()
    assert sorted(p.name for p in (tuned / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == ".." and "/" not in json.dumps(settings["target_modules"])
    written = manifest.read(tuned)
    assert [record["method"] for record in written["stages"]] == ["nf4", "qlora"]
    beside = sum(p.stat().st_size for p in (tuned / "adapter").iterdir())
    assert written["sizes"]["size_bytes"] - manifest.read(nf4)["sizes"]["size_bytes"] == beside
    assert written["sha256"] != manifest.read(nf4)["sha256"]
    assert written["runtimes"] == {"transformers": written["runtimes"]["transformers"]}
    assert f"with peft {peft.__version__}" in written["runtimes"]["transformers"]


def test_the_loader_and_two_lines_of_a_stranger_give_the_same_model(tuned: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tuned), str(tuned / "adapter")).eval()
    ours = pretrained(str(tuned))
    assert torch.equal(logits(ours), logits(LM(model=theirs, tokenizer=ours.tokenizer)))
    bare = AutoModelForCausalLM.from_pretrained(tuned).eval()
    assert not torch.equal(logits(ours), logits(LM(model=bare, tokenizer=ours.tokenizer)))


def test_what_a_finished_artifact_takes_is_read_off_its_files(nf4: Path, tuned: Path) -> None:
    plan = layout_of(pretrained(str(nf4)))
    assert plan.disk_bytes == pytest.approx(manifest.read(nf4)["sizes"]["size_bytes"], rel=0.03)
    both = layout_of(pretrained(str(tuned)))
    assert both.disk_bytes == pytest.approx(manifest.read(tuned)["sizes"]["size_bytes"], rel=0.03)
    made = QLoRA(**QUICK).predict(plan)
    assert made.disk_bytes == pytest.approx(manifest.read(tuned)["sizes"]["size_bytes"], rel=0.03)


def test_another_scale_is_another_artifact(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "copy")
    file = tmp_path / "copy" / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert manifest.content_hash(tmp_path / "copy") != manifest.content_hash(tuned)


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="needs the extra [kv]: hqq")
@pytest.mark.parametrize("artifact", ["nf4", "tuned"])
def test_the_cache_of_a_finished_artifact_can_be_narrowed(
    artifact: str, tmp_path: Path, run_in: Run, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(artifact)
    made = pipeline.compress(pretrained(str(source)), {"kv": KV(4, 32)}, run_in, tmp_path / "artifact")
    for file in source.rglob("*.safetensors"):
        assert (tmp_path / "artifact" / file.relative_to(source)).read_bytes() == file.read_bytes()
    cache = made.model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=2,
        pad_token_id=0,
        return_dict_in_generate=True,
    ).past_key_values
    assert type(cache.layers[0]).__name__ == "HQQQuantizedLayer"


@pytest.mark.parametrize(
    ("artifact", "stages", "message"),
    [
        ("nf4", {"rtn": RTN()}, "quantized already"),
        ("nf4", {"rtn": RTN(), "qlora": QLoRA()}, "quantized already"),
        ("tuned", {"rtn": RTN()}, "has an adapter already"),
        ("tuned", {"qlora": QLoRA()}, "has an adapter already"),
        ("tuned", {"soft_prompt": SoftPrompt()}, "has an adapter already"),
    ],
)
def test_what_would_change_finished_weights_is_refused(
    artifact: str, stages: dict, message: str, tmp_path: Path, run_in: Run, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.compress(pretrained(str(request.getfixturevalue(artifact))), stages, run_in, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_two_adapters_are_refused_before_anything_heavy() -> None:
    with pytest.raises(UserError, match=r"qlora and soft_prompt would each leave.*method\.qlora\.merge=true"):
        pipeline.check_order({"qlora": QLoRA(), "soft_prompt": SoftPrompt()})
    pipeline.check_order({"qlora": QLoRA(merge=True), "soft_prompt": SoftPrompt()})


def test_dora_on_8_bit_weights_is_refused(tiny: Path, run_in: Run) -> None:
    with pytest.raises(UserError, match=r"dora=true.*method=\[nf4,qlora\]"):
        pipeline.check({"int8": Int8(), "qlora": QLoRA(**QUICK, dora=True)}, pretrained(str(tiny)), run_in)


def test_weights_packed_by_another_library_are_refused(tiny: Path, run_in: Run, tmp_path: Path) -> None:
    """In a pipeline, and in the artifact of an earlier one."""
    artifact = pipeline.compress(pretrained(str(tiny)), {"rtn": RTN(4, 64)}, run_in, tmp_path / "packed")
    for stages, base in (({"rtn": RTN(4, 64)}, str(tiny)), ({}, str(artifact.path))):
        with pytest.raises(UserError, match=r"packed by compressed-tensors; write method=\[nf4,qlora\]"):
            pipeline.check({**stages, "qlora": QLoRA(**QUICK)}, pretrained(base), run_in)


def test_kernels_without_a_gradient_are_not_trained_through(tiny: Path, run_in: Run) -> None:
    """What bitsandbytes does to a repacked layer, without a word: its output has no gradient."""
    lm = NF4()(pretrained(str(tiny)), run_in).lm
    lm.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output.detach())
    lm.model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match="no gradient reaches"):
        QLoRA(**QUICK, targets=["q_proj", "gate_proj"])(lm, run_in)


def test_a_training_that_was_cut_off_goes_on(tiny: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def train(folder: Path, cut: bool = False) -> torch.Tensor:
        def curve(step: int, figures: Any) -> None:
            if cut and step == 4:
                raise Cut

        folder.mkdir(exist_ok=True)
        calibration = Calibration(samples=16, max_length=64)
        run = Run(folder, curve=curve, calibration=calibration)
        knobs = {**QUICK, "steps": 6, "precision": "32-true", "checkpoint_minutes": 0.001}
        return logits(QLoRA(**knobs)(pretrained(str(tiny)), run).lm)

    with pytest.raises(Cut):
        train(tmp_path / "cut", cut=True)
    checkpoints = list((tmp_path / "cut").rglob("*.ckpt"))
    if checkpoints:
        kept = torch.load(checkpoints[0], weights_only=False)["state_dict"]
        assert kept and all("lora_" in name for name in kept)
    assert torch.equal(train(tmp_path / "cut"), train(tmp_path / "whole"))


def test_runtimes_that_know_no_adapters_are_not_claimed(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = pretrained(str(tuned))
    assert list(installed_runtimes(lm, "cpu")) == ["transformers"]
    with pytest.raises(UserError, match="vllm does not load the adapter"):
        choose_runtime(lm, Hardware("cpu", device="cpu", runtime="vllm"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else sys.modules.get(name))
    with pytest.raises(MissingExtra, match=r"peft is not installed.*winnow\[peft\]"):
        adapter.check(tuned / "adapter")


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(lost: str, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "copy")
    (tmp_path / "copy" / "adapter" / lost).unlink()
    with pytest.raises(UserError, match=f"adapter/{lost} is missing"):
        pretrained(str(tmp_path / "copy"))


@pytest.mark.parametrize("knobs", [{}, {"dora": True, "targets": ["q_proj", "up_proj"]}])
def test_bytes_are_as_predicted(knobs: dict, tiny: Path, tmp_path: Path, run_in: Run) -> None:
    stage = QLoRA(**{**QUICK, "steps": 1, **knobs})
    made = pipeline.compress(pretrained(str(tiny)), {"qlora": stage}, run_in, tmp_path / "artifact")
    plan = stage.predict(layout_of(pretrained(str(tiny))))
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.03)
