"""Architectures of all kinds: their matrices are all compressed and come back as they were, or the method is refused at once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import REPOSITORY
from tests.method.test_conformance import logits, look_before_saving, stage_of
from tests.wild.architectures import ARCHITECTURES, random_model
from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline, suitability
from winnow.method.bnb import NF4
from winnow.method.knobs import BaseStage, StageResult
from winnow.method.lora import Lora, add_adapters, layers
from winnow.method.oneshot import GPTQ
from winnow.method.prune import Magnitude, Wanda
from winnow.method.rtn import RTN
from winnow.model import manifest
from winnow.model.layers import decoder_blocks, linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.spec import context_of
from winnow.model.unfused import fuse, fused, unfuse
from winnow.training.student import Student

sys.path.insert(0, str(REPOSITORY / "bench"))
import architectures as page

TAKEN_APART = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = random_model(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


def run_in(folder: Path, samples: int = 4) -> Run:
    return Run(folder, calibration=Calibration("nano", samples=samples, max_length=64))


@pytest.mark.parametrize("family", TAKEN_APART)
def test_a_model_that_is_taken_apart_computes_the_same_and_is_put_together_bit_for_bit(
    family: str, base: Callable[[str], Path]
) -> None:
    lm = pretrained(str(base(family)), dtype="float32")
    before, expected = {n: p.clone() for n, p in lm.model.state_dict().items()}, logits(lm)
    unfuse(lm.model)
    torch.testing.assert_close(logits(lm), expected, atol=1e-5, rtol=1e-4)
    linears_before = {n: m.weight.detach().clone() for n, m in linears(lm.model).items()}
    in_matrices = sum(m.weight.numel() for m in linears(lm.model).values())
    assert in_matrices > 0.95 * sum(p.numel() for p in decoder_blocks(lm.model).parameters())
    assert not any(name.rpartition(".")[2] == "gate" for name in linears(lm.model)), "a router"
    fuse(lm.model)
    unfuse(lm.model)
    with fused(lm.model):  # as it is saved
        assert list(lm.model.state_dict()) == list(before)
    assert all(torch.equal(m.weight, linears_before[n]) for n, m in linears(lm.model).items())
    fuse(lm.model)
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("family", "stage"), [("mixtral", RTN(bits=4)), ("qwen3_moe", GPTQ(bits=4))])
def test_experts_are_quantized_and_their_router_is_not(
    family: str, stage: Any, base: Callable[[str], Path], tmp_path: Path
) -> None:
    lm, seen = pretrained(str(base(family))), []  # type: ignore[var-annotated]
    predicted = stage.predict(layout_of(lm)).disk_bytes
    with look_before_saving(seen):
        made = pipeline.compress(lm, {"rtn": stage}, run_in(tmp_path), tmp_path / "artifact")
    assert "transformers" in made.manifest["runtimes"]
    size = manifest.sizes(tmp_path / "artifact")["size_bytes"]
    assert size == pytest.approx(predicted, rel=0.02)
    assert layout_of(pretrained(str(tmp_path / "artifact"))).disk_bytes == pytest.approx(size, rel=0.02)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    original: Any = AutoModelForCausalLM.from_pretrained(base(family))
    torch.testing.assert_close(logits(LM(model=model, tokenizer=lm.tokenizer)), seen[-1], atol=2e-2, rtol=2e-2)
    experts, router = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate.weight
    groups = experts.down_proj.data[0].float().unflatten(-1, (-1, stage.group_size))
    assert all(len(group.unique()) <= 16 for group in groups[:8].flatten(0, 1))
    assert torch.equal(router, original.model.layers[0].mlp.gate.weight)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt2"])
def test_pruning_reaches_every_matrix_and_is_saved_as_the_architecture_has_it(
    family: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline.compress(pretrained(str(base(family))), {"magnitude": Magnitude(0.5)}, run_in(tmp_path), tmp_path / "made")
    model, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "made", base(family)))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and re.search(r"\.(experts|self_attn|attn|c_fc)\.", name):
            assert (parameter == 0).float().mean().item() == pytest.approx(0.5, abs=0.01), name
        elif ".mlp.c_proj.weight" not in name:
            assert torch.equal(parameter, original.get_parameter(name)), name
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]


def test_low_rank_updates_are_trained_for_every_expert(base: Callable[[str], Path]) -> None:
    lm = pretrained(str(base("mixtral")))
    unfuse(lm.model)
    wanted = set(linears(lm.model))
    assert set(layers(add_adapters(lm.model, Lora(rank=4), 0).base_model.model)) == wanted


def test_experts_that_calibration_does_not_reach_are_named(
    base: Callable[[str], Path], tmp_path: Path, log_lines: list[str]
) -> None:
    folder = random_model("mixtral", tmp_path / "base", num_local_experts=32)
    run = Run(tmp_path, calibration=Calibration("nano", samples=1, max_length=8))
    made = pipeline.compress(pretrained(str(folder)), {"wanda": Wanda(0.5)}, run, tmp_path / "made")
    without = made.manifest["stages"][0]["experts_without_tokens"]
    assert len(without) >= 16  # of 64, when at most 8 tokens each go to 2 in a layer
    assert any(f"no token to {len(without)} experts" in line for line in log_lines)
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "made").model.layers[0].mlp.experts  # type: ignore[attr-defined]
    assert (experts.down_proj == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


REFUSED = [
    ("mixtral", NF4(), "method=nf4: its format does not hold experts"),
    ("granitemoe", RTN(), "experts that checkpoints have as one tensor"),
    ("gpt2", RTN(), "transposed matrices"),
    ("falcon", NF4(), "linear layers of a class of its own (FalconLinear)"),
    ("gpt_oss", RTN(), "would stay as they are"),
]


@pytest.mark.parametrize(("family", "stage", "words"), REFUSED, ids=[f"{f}-{type(s).__name__}" for f, s, _ in REFUSED])
def test_what_a_format_cannot_hold_is_refused_before_anything_is_made(
    family: str, stage: Any, words: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    name = type(stage).__name__.lower()
    lm = pretrained(str(base(family)))
    plan = layout_of(lm)
    with pytest.raises(UserError) as forecast:
        suitability.check({name: stage}, plan.tensors, plan.spec.name)
    with pytest.raises(UserError) as refusal:
        pipeline.compress(lm, {name: stage}, run_in(tmp_path), tmp_path / "made")
    assert words in str(refusal.value)
    assert str(forecast.value) == str(refusal.value)
    assert not (tmp_path / "made").exists()


@dataclass(frozen=True)
class Idle(BaseStage):
    slot: ClassVar[Slot] = Slot.QUANTIZE

    def __call__(self, lm: LM, run: Run) -> StageResult:
        return StageResult(lm.with_model(lm.model))


def test_a_stage_that_changes_nothing_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method=idle has changed no weight of"):
        pipeline.compress(pretrained(str(tiny)), {"idle": Idle()}, run_in(tmp_path), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_documents_are_padded_where_attention_cannot_be_told_of_them(
    family: str, base: Callable[[str], Path], tmp_path: Path, log_lines: list[str]
) -> None:
    lora = Lora(rank=4, steps=2, tokens_per_batch=128, max_length=32)
    assert not Student(pretrained(str(base(family))).model).packs
    pipeline.compress(pretrained(str(base(family))), {"lora": lora}, run_in(tmp_path), tmp_path / "made")
    assert any("documents are padded" in line for line in log_lines)


def test_a_model_without_a_longest_sequence_is_described(base: Callable[[str], Path]) -> None:
    plan = layout_of(pretrained(str(base("bloom"))))
    assert context_of(plan.config) is None
    assert plan.spec.context > 0


def test_attention_is_what_the_architecture_knows(base: Callable[[str], Path]) -> None:
    assert pretrained(str(base("llama"))).model.config._attn_implementation == "sdpa"
    assert pretrained(str(base("gpt_oss"))).model.config._attn_implementation == "eager"


HELD = json.loads(page.FIGURES.read_text(encoding="utf-8"))


def test_the_page_is_made_from_what_was_tried() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.table(HELD), "make it anew: python bench/architectures.py page"
    assert list(HELD) == list(ARCHITECTURES)
    assert not [outcome for row in HELD.values() for outcome in row.values() if outcome.startswith("DEFECT")]


@pytest.mark.parametrize("family", sorted(HELD))
def test_the_page_says_what_is_refused(family: str, base: Callable[[str], Path]) -> None:
    plan = layout_of(pretrained(str(base(family))))
    for name, outcome in HELD[family].items():
        try:
            suitability.check({name: stage_of(name)}, plan.tensors, plan.spec.name)
        except UserError as error:
            assert outcome == str(error), f"{name}: try it again with bench/architectures.py"
