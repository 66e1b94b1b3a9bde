"""Low-rank factorisation: the best products, in artifacts that winnow loads by itself and others with trust_remote_code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import UserError
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.method import pipeline
from winnow.method.lora import Lora
from winnow.method.lowrank import LowRank, best_product
from winnow.method.rtn import RTN
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.model.spec import spec


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    return lm.model(input_ids=torch.arange(40)[None] + 5).logits.float()


@pytest.fixture(scope="module")
def factorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a random Llama."""
    from winnow.core.types import Calibration
    from winnow.hardware.run import Run

    folder = tmp_path_factory.mktemp("factorised")
    run = Run(folder, calibration=Calibration(samples=16, max_length=128))
    base = random_model("llama", folder / "base")
    pipeline.compress(pretrained(str(base)), {"lowrank": LowRank()}, run, folder / "artifact")
    return folder / "artifact"


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (40, 24), (32, 32)])
def test_no_product_of_that_rank_comes_nearer(outputs: int, inputs: int) -> None:
    """The loss is the tail of the singular values of W L for moments L L^T (SVD-LLM, theorem 3.2)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(200, inputs, generator=generator) * torch.logspace(0, 2, inputs)
    moment = x.T @ x
    up, down = best_product(weight, moment, 8)
    assert up.shape == (outputs, 8) and down.shape == (8, inputs)
    loss = ((weight.double() - up @ down) @ x.double().T).square().sum()
    whitened = weight.double() @ torch.linalg.cholesky(moment.double())
    torch.testing.assert_close(loss, torch.linalg.svdvals(whitened)[8:].square().sum(), rtol=1e-4, atol=0)


def test_inputs_that_calibration_never_saw_do_no_harm() -> None:
    weight, x = torch.randn(16, 16), torch.randn(3, 16)
    for moment in (x.T @ x, torch.zeros(16, 16)):
        up, down = best_product(weight, moment, 8)
        assert up.isfinite().all() and down.isfinite().all() and max(up.abs().max(), down.abs().max()) < 1e4
    up, down = best_product(weight, x.T @ x, 8)
    torch.testing.assert_close((up @ down).float() @ x.T, weight @ x.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_the_artifact_computes_what_it_did_in_memory(family: str, tmp_path: Path, run_in) -> None:
    base = random_model(family, tmp_path / "base")
    config = pretrained(str(base)).config()
    compressed = pipeline.apply(pretrained(str(base)), {"lowrank": LowRank()}, run_in)
    before = logits(compressed)
    made = save(compressed, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    assert again.model.config.model_type == f"lowrank_{family}"
    assert again.model.config.low_rank["model.layers.1.mlp.up_proj"] == 128

    whole = pretrained(str(base)).model
    for name, parameter in whole.named_parameters():
        if not any(name == f"{linear}.weight" for linear in linears(whole)):
            name = name.replace("_proj.bias", "_proj.1.bias")
            assert torch.equal(parameter, again.model.get_parameter(name)), name

    plan = LowRank().predict(ModelLayout(config, dense_tensors(config)))
    assert set(plan.tensors) == {name for name, _ in again.model.named_parameters()}
    code = (tmp_path / "artifact" / "modeling_lowrank.py").stat().st_size
    assert plan.disk_bytes - plan.other_bytes == pytest.approx(made.manifest["sizes"]["weight_bytes"], rel=0.005)
    assert code < plan.other_bytes < code + 4096
    counts = spec(tmp_path / "artifact")
    assert counts.parameters == sum(p.numel() for p in again.model.parameters())
    assert counts.linear_parameters == sum(linear.weight.numel() for linear in linears(again.model).values())


def test_the_factors_are_near_the_weights_that_they_replace(tmp_path: Path, run_in) -> None:
    base = pretrained(str(random_model("mistral", tmp_path / "base"))).model
    made = LowRank(0.95, 16)(pretrained(str(tmp_path / "base")), run_in).lm.model
    for name, linear in linears(base).items():
        product = made.get_submodule(name)
        weight = product[1].weight.float() @ product[0].weight.float()
        # a random matrix loses this much at a bit under half its rank
        assert (weight - linear.weight.float()).norm() < 0.65 * linear.weight.float().norm()


@pytest.mark.parametrize(
    ("inputs", "outputs", "stage", "rank"),
    [
        (4096, 4096, LowRank(0.75), 1536),
        (4096, 14336, LowRank(0.5, 128), 1536),  # 1593 at most
        (256, 256, LowRank(0.75), 64),  # 96 at most
        (256, 768, LowRank(0.75), 128),
        (256, 256, LowRank(0.05), 64),  # at least one multiple
        (64, 128, LowRank(0.75), 32),  # narrower than four multiples: of a quarter of the width
        (64, 64, LowRank(0.75), 16),
        (16, 4096, LowRank(0.05, 128), 4),
    ],
)
def test_ranks(inputs: int, outputs: int, stage: LowRank, rank: int) -> None:
    assert stage._rank(inputs, outputs) == stage._rank(outputs, inputs) == rank
    assert rank * (inputs + outputs) <= max(stage.share, 0.51) * inputs * outputs


def test_recovery_and_quantization_work_on_the_factors(tmp_path: Path, factorised: Path, run_in) -> None:
    stages = {"lora": Lora(steps=2, tokens_per_batch=256), "rtn": RTN(4, 64)}
    made = pipeline.compress(pretrained(str(factorised)), stages, run_in, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    assert logits(again).isfinite().all()
    plan = ModelLayout(pretrained(str(factorised)).config(), dense_tensors(pretrained(str(factorised)).config()))
    assert stages["rtn"].predict(plan).disk_bytes == pytest.approx(made.manifest["sizes"]["weight_bytes"], rel=0.01)
    names = set(linears(pretrained(str(factorised)).model))
    assert "model.layers.0.mlp.up_proj.0" in names and "model.layers.0.mlp.up_proj.1" in names


def test_the_folders_own_code_is_never_run_here(tmp_path: Path, run_in, factorised: Path) -> None:
    import shutil

    folder = shutil.copytree(factorised, tmp_path / "copy")
    (folder / "modeling_lowrank.py").write_text("raise SystemExit('run')")
    for trust in (False, True):
        assert logits(pretrained(str(folder), trust_remote_code=trust)).isfinite().all()
        assert pretrained(str(folder), trust_remote_code=trust).config().model_type == "lowrank_llama"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "another"}))
    with pytest.raises(UserError, match="brings its own code"):
        pretrained(str(folder))


ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output, trust = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust == "True")
AutoTokenizer.from_pretrained(folder)
assert not any(name.startswith("winnow") for name in sys.modules)
with torch.inference_mode():
    torch.save(model(input_ids=torch.arange(40)[None] + 5).logits.float(), output)
"""


def test_without_winnow_transformers_wants_trust_and_then_computes_the_same(factorised: Path, tmp_path: Path) -> None:
    answers = {}
    for trust in (False, True):
        line = [sys.executable, "-c", ELSEWHERE, str(factorised), str(tmp_path / "logits"), str(trust)]
        answers[trust] = subprocess.run(
            line,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"HF_HOME": str(tmp_path / "hub"), "PATH": ""},
        )
    assert answers[False].returncode and "trust_remote_code=True" in answers[False].stderr
    assert not answers[True].returncode, answers[True].stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(pretrained(str(factorised))), rtol=0, atol=0)


def test_what_cannot_be_factorised_is_refused() -> None:
    from transformers import Phi3Config

    with pytest.raises(UserError, match=r"method=\[lowrank\] factorises gemma3_text, llama, .* not phi3"):
        LowRank().predict(ModelLayout(Phi3Config(), {}))
