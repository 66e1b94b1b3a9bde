"""gptq, awq, smoothquant and fp8: what is saved is what was computed, and the library's silent failures are not met."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.method.scores import perplexity
from tests.method.shapes import random_model
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.knobs import Stage, knobs_of
from winnow.method.oneshot import AWQ, GPTQ
from winnow.method.oneshot_8bit import FP8, SmoothQuant
from winnow.method.prune import Wanda
from winnow.method.rtn import RTN
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import trained

pytest.importorskip("llmcompressor")

CASES: dict[str, Stage] = {
    "gptq2": GPTQ(2, 128),
    "gptq3": GPTQ(3, 32, act_order="none"),
    "gptq4": GPTQ(4, 64, scale="mse"),
    "gptq8": GPTQ(8, 64),
    "awq2": AWQ(2, 64, grid=3),
    "awq3": AWQ(3, 128, grid=3),
    "smoothquant": SmoothQuant(),
    "fp8": FP8(),
    "fp8_block": FP8("block"),
}
SHAPES = ("qwen2", "gemma3_text", "mistral")
CLOSE: dict[str, Stage] = {"gptq": GPTQ(8), "awq": AWQ(8, grid=5), "smoothquant": SmoothQuant(0.8)}  # to the base


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    ids = lm.tokenizer(["Question: Tom has 5 apples. Tom buys 7 more."], return_tensors="pt").input_ids
    return lm.model(input_ids=ids).logits.float()


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = random_model(family, tmp_path_factory.mktemp("bases") / family)
        return made[family]

    return base


@pytest.fixture
def quick(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", calibration=Calibration(samples=16, max_length=64))


def plan_of(folder: Path) -> ModelLayout:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    others = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".safetensors")
    return ModelLayout(config, dense_tensors(config), others)


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_computes_what_was_saved_in_the_predicted_size(
    name: str, base_of, quick, tmp_path: Path
) -> None:
    folder, stage = base_of("llama"), CASES[name]
    made = pipeline.apply(pretrained(str(folder)), {name: stage}, quick)
    before = logits(made)
    saved = save(made, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    plan = stage.predict(plan_of(folder))
    assert plan.disk_bytes == pytest.approx(saved.manifest["sizes"]["size_bytes"], rel=0.005)
    loaded = sum(p.nbytes for p in again.model.parameters())
    assert plan.memory_bytes == pytest.approx(loaded, rel=0.03)


@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("family", SHAPES)
def test_other_shapes_keep_their_function_and_reload(family: str, name: str, base_of, quick, tmp_path: Path) -> None:
    lm = pretrained(str(base_of(family)))
    base = logits(lm)
    made = pipeline.apply(lm, {name: CLOSE[name]}, quick)
    before = logits(made)
    assert (before - base).abs().mean() < 0.05 * base.abs().mean()
    save(made, tmp_path / "artifact")
    torch.testing.assert_close(logits(pretrained(str(tmp_path / "artifact"))), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "moved"),
    [
        (GPTQ(4), set()),
        (AWQ(2, grid=8), {"pre_feedforward_layernorm"}),
        (SmoothQuant(), {"input_layernorm", "pre_feedforward_layernorm"}),
    ],
    ids=["gptq", "awq", "smoothquant"],
)
def test_norms_of_gemma_that_no_scale_goes_into_keep_every_bit(stage: Stage, moved: set[str], base_of, quick) -> None:
    norms = {n: p.clone() for n, p in pretrained(str(base_of("gemma3_text"))).model.named_parameters() if "norm" in n}
    after = dict(stage(pretrained(str(base_of("gemma3_text"))), quick).lm.model.named_parameters())
    changed = {name.split(".")[-2] for name, before in norms.items() if not torch.equal(after[name], before)}
    assert changed == moved


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [(GPTQ(3), "2:4"), (GPTQ(2), "unstructured"), (AWQ(3, grid=3), "2:4"), (SmoothQuant(), "2:4"), (FP8(), "2:4")],
    ids=["gptq", "gptq-unstructured", "awq", "smoothquant", "fp8"],
)
def test_pruned_weights_stay_zero(stage: Stage, pattern: str, tiny: Path, quick) -> None:
    pruned = Wanda(pattern=pattern)(pretrained(str(tiny)), quick).lm
    zeros = {name: linear.weight == 0 for name, linear in linears(pruned.model).items()}
    made = stage(pruned, quick).lm
    for name, linear in linears(made.model).items():
        assert (linear.weight[zeros[name]] == 0).all(), name
        assert zeros[name].float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("stage", [GPTQ(3), AWQ(4, grid=3)], ids=lambda s: type(s).__name__.lower())
def test_the_same_seed_makes_the_same_bytes(stage: Stage, tiny: Path, quick, tmp_path: Path) -> None:
    hashes = {
        pipeline.compress(pretrained(str(tiny)), {"it": stage}, quick, tmp_path / str(i)).manifest["sha256"]
        for i in range(2)
    }
    assert len(hashes) == 1


def test_both_beat_rounding_to_nearest_at_two_bits(quick) -> None:
    run = dataclasses.replace(quick, calibration=Calibration(samples=24, max_length=96))
    plain = perplexity(RTN(2, 64)(trained(), run).lm, 40)
    assert perplexity(GPTQ(2)(trained(), run).lm, 40) < 0.9 * plain
    assert perplexity(AWQ(2, grid=3)(trained(), run).lm, 40) < 0.95 * plain


def test_a_line_a_block_is_logged_and_nothing_is_printed(
    tiny: Path, quick, capfd: pytest.CaptureFixture[str], log_lines: list[str]
) -> None:
    for stage in (GPTQ(4), AWQ(4, grid=3), SmoothQuant(), FP8()):
        name = type(stage).__name__.lower()
        made = stage(pretrained(str(tiny)), quick)
        assert log_lines[-2:] == [f"{name}: block 1 of 2", f"{name}: block 2 of 2"]
        assert "starts over" in log_lines[-3] and len(log_lines) == 3
        assert ("calibration_sha256" in made.notes) == (name != "fp8")
        log_lines.clear()
    assert capfd.readouterr() == ("", "")


def test_awq_works_without_an_accelerator(tiny: Path, quick) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = vars(IntermediatesCache)["_pin_intermediate"]
    AWQ(4, grid=3)(pretrained(str(tiny)), quick)
    assert vars(IntermediatesCache)["_pin_intermediate"] is pin


@pytest.mark.parametrize(
    "stage", [GPTQ(3), AWQ(3, grid=3), SmoothQuant(), FP8()], ids=lambda s: type(s).__name__.lower()
)
def test_neither_asymmetric_nor_static_quantization_is_offered(stage: Stage, tiny: Path, quick, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert not {"symmetric", "dynamic"} & set(knobs_of(stage))
    pipeline.compress(pretrained(str(tiny)), {"it": stage}, quick, tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        assert group["weights"]["symmetric"]
        assert group["input_activations"] is None or group["input_activations"]["dynamic"] is True
    with safe_open(tmp_path / "artifact" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "zero_point" in name]  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("stage", [SmoothQuant(), FP8(), FP8("block")], ids=["smoothquant", "fp8", "fp8_block"])
def test_activations_are_rounded_after_loading_too(stage: Stage, base_of, quick, tmp_path: Path) -> None:
    pipeline.compress(pretrained(str(base_of("llama"))), {"it": stage}, quick, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    assert logits(again).isfinite().all()
    linear = linears(again.model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(1, 3, linear.in_features, dtype=torch.bfloat16)
    assert not torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))


@pytest.fixture
def llama(tiny: Path) -> LM:
    return pretrained(str(tiny))


def test_widths_that_do_not_fit_are_refused(tiny: Path, quick) -> None:
    for stage in (GPTQ(group_size=128), AWQ(group_size=128)):
        with pytest.raises(UserError, match=r"group_size=128 does not divide the width 64 of model\.layers\.0"):
            pipeline.check({"stage": stage}, pretrained(str(tiny)), quick)
    with pytest.raises(UserError, match=r"scales=block takes widths that are multiples of 128, not 64"):
        pipeline.check({"fp8": FP8("block")}, pretrained(str(tiny)), quick)


@pytest.mark.parametrize(
    "stage", [GPTQ(4), AWQ(4, grid=3), SmoothQuant(), FP8()], ids=lambda s: type(s).__name__.lower()
)
def test_what_is_not_finite_is_an_error(stage: Stage, llama: LM, quick) -> None:
    linears(llama.model)["model.layers.1.mlp.down_proj"].weight.data[3, 5] = math.nan
    with pytest.raises(UserError, match=r"down_proj|model\.layers\.1\.mlp puts out NaN"):
        stage(llama, quick)


def test_a_hessian_that_cannot_be_inverted_is_an_error(llama: LM, quick) -> None:
    llama.model.model.layers[0].input_layernorm.weight.data[0] = math.inf
    with pytest.raises(UserError, match=r"the Hessian of model\.layers\.0\.self_attn.* raise method\.gptq\.damping"):
        GPTQ(4)(llama, quick)
