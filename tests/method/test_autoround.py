"""AutoRound: what is tuned and what must not move, both formats, other shapes, and that the library keeps to itself."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logged import logged
from tests.method.scores import perplexity
from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import MissingExtra, UserError
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import checkpoint, pipeline
from winnow.method.autoround import AutoRound
from winnow.method.knobs import knobs_of
from winnow.method.rtn import RTN
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

pytest.importorskip("auto_round")
from winnow.method import autoround_driver as driver

FORMATS = ("llm_compressor", "auto_round")
IDS = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 90]])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def quick(bits: int = 3, iters: int = 1, **knobs: Any) -> AutoRound:
    return AutoRound(bits, 32, iters, 2, **knobs)


def made(stage: AutoRound, base: Path, run: Run, folder: Path) -> LM:
    return pipeline.compress(pretrained(str(base)), {"autoround": stage}, run, folder)


def test_calibration_rows_leave_no_token_out() -> None:
    batches = [torch.arange(10, 13).repeat(4, 1), torch.arange(20, 25).repeat(2, 1), torch.arange(30, 37)[None]]
    rows = driver.rows_of(batches)
    assert {row.shape for row in rows} == {(1, 7)}
    stream = torch.cat([batch.flatten() for batch in batches])
    assert torch.equal(torch.cat(rows, 1)[0, :28], stream[:28])
    assert torch.equal(rows[-1][0], stream[-7:])
    equal = torch.arange(12).view(3, 4)
    assert torch.equal(torch.cat(driver.rows_of([equal[:2], equal[2:]])), equal)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_an_artifact_computes_what_the_model_in_memory_did(
    bits: int, format: str, tmp_path: Path, tiny: Path, run_in: Run
) -> None:
    from transformers import AutoModelForCausalLM

    stage = quick(bits, format=format)
    compressed = pipeline.apply(pretrained(str(tiny)), {"autoround": stage}, run_in)
    before = logits(compressed.model)
    saved = save(compressed, tmp_path / "artifact")
    for again in (pretrained(saved.path).model, AutoModelForCausalLM.from_pretrained(saved.path)):
        torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    plan = stage.predict(layout_of(pretrained(str(tiny))))
    assert plan.disk_bytes == pytest.approx(saved.manifest["sizes"]["size_bytes"], rel=0.03)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_of_the_embedded_model_are_as_predicted(format: str, tmp_path: Path, run_in: Run) -> None:
    stage = AutoRound(3, 64, 0, format=format)
    size = made(stage, WEIGHTS, run_in, tmp_path / "artifact").manifest["sizes"]["size_bytes"]
    plan = stage.predict(layout_of(pretrained(str(WEIGHTS))))
    assert plan.disk_bytes == pytest.approx(size, rel=0.005)
    model: Any = pretrained(str(tmp_path / "artifact")).model
    held = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
    tied = model.lm_head.weight.numel() * 2  # counted once
    if format == "auto_round":
        assert plan.memory_bytes == pytest.approx(held - tied, rel=0.001)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_shapes(family: str, format: str, tmp_path: Path, run_in: Run) -> None:
    base = random_model(family, tmp_path / "base")
    compressed = pipeline.apply(pretrained(str(base)), {"autoround": quick(4, format=format)}, run_in)
    before, again = logits(compressed.model), pretrained(save(compressed, tmp_path / "artifact").path).model
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    originals, parameters = pretrained(str(base)).model.state_dict(), again.state_dict()
    for name, parameter in originals.items():
        if name.removesuffix(".weight") not in linears(compressed.model) and "_proj.weight" not in name:
            assert torch.equal(parameters[name], parameter), name


def test_each_block_is_called_as_in_the_model(tmp_path: Path, run_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's layers differ in their rotary embeddings and masks; the library by itself takes those of the first for all."""
    model: Any = pretrained(str(random_model("gemma3_text", tmp_path / "base"))).model
    lm = pretrained(str(tmp_path / "base"))
    seen: list[torch.Tensor] = []
    tune = driver._tune

    def watched(*arguments: Any) -> Any:
        exact, tuned = tune(*arguments)
        seen[:] = exact
        return exact, tuned

    monkeypatch.setattr(driver, "_tune", watched)
    quick()(lm, run_in)
    from winnow.data.calibration import calibration_batches

    rows = torch.cat(driver.rows_of(calibration_batches(lm, run_in)[0]))
    with torch.no_grad():
        expected = model.model(input_ids=rows).last_hidden_state
        found = model.model.norm(torch.cat(seen)).float()
        torch.testing.assert_close(found, expected.float(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_pruned_weights_stay_zero(pattern: str, tiny: Path, run_in: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.method.prune import Magnitude

    monkeypatch.setattr(driver, "LEARNING_RATE", 1.0)  # so that rounding moves by more than half a step

    pruned = Magnitude(pattern=pattern)(pretrained(str(tiny)), run_in).lm
    zeros = {name: linear.weight == 0 for name, linear in linears(pruned.model).items()}
    tuned = quick(2, 8)(pruned, run_in).lm
    for name, linear in linears(tuned.model).items():
        assert (linear.weight[zeros[name]] == 0).all() and (linear.integers[zeros[name]] == 0).all(), name
        assert not (linear.weight == 0).all()


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    first, second = (made(quick(2, 3), tiny, run_in, tmp_path / str(i)).manifest["sha256"] for i in range(2))
    assert first == second


def test_it_beats_rounding_to_nearest(run_in: Run) -> None:
    def made_by(stage: Any) -> float:
        return perplexity(stage(pretrained(str(WEIGHTS)), run_in).lm, 50)

    nearest, searched, tuned = made_by(RTN(2, 64)), made_by(AutoRound(2, 64, 0)), made_by(AutoRound(2, 64, 10))
    assert searched < nearest
    assert tuned < nearest  # after a few steps only; the default takes 200


def test_a_run_that_died_goes_on_at_its_block(
    tmp_path: Path, tiny: Path, run_in: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(quick(2, 3), tiny, run_in, tmp_path / "whole").manifest["sha256"]
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_S", 0.0)

    def dying(line: str) -> None:
        if "block 2 of 2" in line:
            raise KeyboardInterrupt

    (tmp_path / "again").mkdir()
    run = dataclasses.replace(run_in, folder=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt), logged(dying):
        made(quick(2, 3), tiny, run, tmp_path / "never")
    with logged() as said:
        assert made(quick(2, 3), tiny, run, tmp_path / "resumed").manifest["sha256"] == whole
    assert [line for line in said if "block" in line] == [
        "autoround: going on at block 2 of 2",
        "autoround: block 2 of 2",
    ]


def test_the_library_keeps_to_itself(
    tmp_path: Path,
    tiny: Path,
    run_in: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    log_lines: list[str],
) -> None:
    """No output, no files but the artifact, no network, and the process as it was."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("it downloads"))
    lm = pretrained(str(tiny))
    lm.model.config.name_or_path = "somebody/moved-away"
    (tmp_path / "own").mkdir()
    run = dataclasses.replace(run_in, folder=tmp_path / "own")
    before = {p for p in tmp_path.rglob("*") if "own" not in p.parts}
    random.seed(5), torch.manual_seed(5)
    state, printed = torch.get_rng_state(), repr(torch.tensor([1.23456789]))
    expected = random.Random(5).random()
    capfd.readouterr()
    quick()(lm, run)
    assert capfd.readouterr() == ("", "")
    assert log_lines == ["autoround: block 1 of 2", "autoround: block 2 of 2"]
    assert {p for p in tmp_path.rglob("*") if "own" not in p.parts} == before
    assert torch.equal(torch.get_rng_state(), state) and random.random() == expected
    assert repr(torch.tensor([1.23456789])) == printed
    assert not torch.are_deterministic_algorithms_enabled()
    for module in lm.model.modules():
        assert not {"global_name", "orig_layer", "scale", "bits", "imatrix"} & set(vars(module))


def test_asymmetric_integers_are_not_offered(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    assert not {"sym", "asym", "zero_point"} & set(knobs_of(AutoRound))
    made(quick(format="auto_round"), tiny, run_in, tmp_path / "artifact")
    written = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    assert written["sym"] is True and written["packing_format"] == "auto_round:auto_gptq"


def test_float16_is_avoided_on_a_processor(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    """Packed layers are tens of times slower in float16 there; published AutoRound models come in it."""
    folder = tmp_path / "artifact"
    made(quick(format="auto_round"), tiny, run_in, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model: Any = pretrained(str(folder)).model
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert pretrained(str(folder), dtype="float16").model.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_of_weights(dtype: str, tmp_path: Path, tiny: Path, run_in: Run) -> None:
    base = pretrained(str(tiny), dtype=dtype)
    for format in FORMATS:
        lm = pretrained(str(tiny), dtype=dtype)
        compressed = pipeline.apply(lm, {"autoround": quick(format=format)}, run_in)
        kept = torch.bfloat16 if (dtype, format) == ("float32", "auto_round") else getattr(torch, dtype)
        embedding: Any = base.model.get_input_embeddings()
        found: Any = compressed.model.get_input_embeddings()
        assert compressed.model.dtype == kept and torch.equal(found.weight, embedding.weight.to(kept))
        before, saved = logits(compressed.model), save(compressed, tmp_path / format)
        again = pretrained(saved.path, dtype=str(kept).removeprefix("torch.")).model
        torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
        plan = quick(format=format).predict(layout_of(base))
        assert plan.disk_bytes == pytest.approx(saved.manifest["sizes"]["size_bytes"], rel=0.03)


def test_what_it_cannot_do_is_said_before_anything_heavy(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    with pytest.raises(UserError, match=r"group_size=128 does not divide the width 64 of model\.layers"):
        pipeline.check({"autoround": AutoRound(group_size=128)}, pretrained(str(tiny)), run_in)
    narrow = random_model("llama", tmp_path / "narrow", head_dim=24, num_key_value_heads=1)
    with pytest.raises(UserError, match=r"k_proj has 24; take format=llm_compressor"):
        pipeline.check({"autoround": quick(format="auto_round")}, pretrained(str(narrow)), run_in)


def test_a_missing_library_names_its_extra(tmp_path: Path, tiny: Path, run_in: Run, monkeypatch) -> None:
    import importlib.util

    made(quick(format="auto_round"), tiny, run_in, tmp_path / "artifact")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "auto_round" else find(name, *a))
    with pytest.raises(
        MissingExtra, match=r"auto-round is not installed; install it with: pip install 'winnow\[autoround\]'"
    ):
        pretrained(str(tmp_path / "artifact"))
