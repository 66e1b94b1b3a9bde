"""The conformance suite of methods: run over every option of `conf/method` that a model can be compressed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_conf import class_of, composed
from winnow.cli import options
from winnow.method import pipeline
from winnow.model import manifest
from winnow.model.load import pretrained
from winnow.model.packing import linears
from winnow.types import LM, Slot, UserError

METHODS = [name for name in options("method") if name != "pretrain"]  # pretrain needs hours to be worth anything
BITS = {"rtn": 4, "int8": 8, "nf4": 4}


def stage_of(name: str):
    stage = class_of(composed("compress", f"method=[{name}]").method[name])
    return stage(steps=3, tokens_per_batch=256) if name == "lora" else stage()


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    ids = lm.tokenizer(["Question: Tom has 5 apples. Tom buys 7 more."], return_tensors="pt").input_ids
    return lm.model(input_ids=ids).logits.float()


@pytest.mark.parametrize("name", METHODS)
def test_an_artifact_loads_again_and_computes_what_it_did_before(name: str, tmp_path: Path, run_in) -> None:
    from winnow.model.save import save
    from winnow.nano.model import trained

    compressed = pipeline.apply(trained(), {name: stage_of(name)}, run_in)
    before = logits(compressed)
    saved = save(compressed, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    for module in again.model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # its faster kernel rounds differently: not what is tested here
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    assert saved.manifest == again.manifest


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rtn_is_lossless_on_disk_at_every_width(bits: int, tmp_path: Path, run_in) -> None:
    from winnow.method.rtn import RTN
    from winnow.model.save import save
    from winnow.nano.model import trained

    compressed = pipeline.apply(trained(), {"rtn": RTN(bits, 32)}, run_in)
    before = logits(compressed)
    save(compressed, tmp_path / "artifact")
    torch.testing.assert_close(logits(pretrained(str(tmp_path / "artifact"))), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_plain_transformers_loads_it(name: str, tmp_path: Path, tiny: Path, run_in) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pipeline.compress(pretrained(str(tiny)), {name: stage_of(name)}, run_in, tmp_path / "artifact")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    with torch.inference_mode():
        ids = tokenizer("Tom has", return_tensors="pt").input_ids
        assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_the_manifest_says_how_it_was_made(name: str, tmp_path: Path, tiny: Path, run_in) -> None:
    made = pipeline.compress(pretrained(str(tiny)), {name: stage_of(name)}, run_in, tmp_path / "artifact")
    record = made.manifest["stages"][-1]
    assert record["method"] == name
    assert record["seed"] == run_in.seed
    assert record["seconds"] > 0
    assert record["energy_source"] in ("counter", "estimated", "none")
    assert made.manifest["base"]["sha256"] == manifest.read(tiny)["sha256"]
    assert made.manifest["sizes"] == manifest.sizes(tmp_path / "artifact")
    assert made.manifest["sha256"] == manifest.content_hash(tmp_path / "artifact")


@pytest.mark.parametrize("name", [n for n in METHODS if n in BITS])
def test_quantized_weights_are_really_packed(name: str, tmp_path: Path, run_in) -> None:
    from winnow.nano.model import trained

    base = trained()
    weights = sum(linear.weight.numel() for linear in linears(base.model).values())
    others = 2 * (sum(p.numel() for p in base.model.parameters()) - weights)
    made = pipeline.compress(base, {name: stage_of(name)}, run_in, tmp_path / "artifact")
    bits = 8 * (made.manifest["sizes"]["weight_bytes"] - others) / weights
    assert BITS[name] <= bits <= BITS[name] + 0.6  # scales, names and shapes


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_makes_the_same_bytes(name: str, tmp_path: Path, tiny: Path, run_in) -> None:
    hashes = [
        pipeline.compress(pretrained(str(tiny)), {name: stage_of(name)}, run_in, tmp_path / str(i)).manifest["sha256"]
        for i in range(2)
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_rtn_rounds_to_the_nearest_point_of_its_grid(tiny: Path, run_in, bits: int, group_size: int) -> None:
    from winnow.method.rtn import RTN

    base = {n: m.weight.detach().clone().float() for n, m in linears(pretrained(str(tiny)).model).items()}
    quantized = RTN(bits, group_size)(pretrained(str(tiny)), run_in).model
    for name, linear in linears(quantized).items():
        groups, step = base[name].view(-1, group_size), linear.weight_scale.float().view(-1, 1)
        torch.testing.assert_close(step, groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2), rtol=0.01, atol=0)
        integers = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        # the product is rounded to the 8 binary digits of bfloat16
        torch.testing.assert_close(linear.weight.float().view(-1, group_size), integers * step, rtol=2**-8, atol=0)


def test_order_and_slots_are_checked() -> None:
    made = {name: stage_of(name) for name in ("wanda", "lora", "rtn", "nf4")}
    pipeline.check_order({k: made[k] for k in ("wanda", "lora", "rtn")})
    with pytest.raises(UserError, match=r"method=\[rtn,wanda\].*write method=\[wanda,rtn\]"):
        pipeline.check_order({k: made[k] for k in ("rtn", "wanda")})
    with pytest.raises(UserError, match="both quantize"):
        pipeline.check_order({k: made[k] for k in ("rtn", "nf4")})


def test_an_unknown_group_size_for_the_width_names_the_layer(tmp_path: Path, tiny: Path, run_in) -> None:
    from winnow.method.rtn import RTN

    with pytest.raises(UserError, match=r"group_size=128 does not divide the width 64 of model\.layers"):
        RTN(4, 128)(pretrained(str(tiny)), run_in)


def test_slots_are_in_the_documented_order() -> None:
    assert [s.name for s in sorted(Slot)] == ["PRUNE", "RECOVER", "QUANTIZE", "ADAPT", "CACHE", "PROMPT"]
