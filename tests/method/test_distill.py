"""`distill`: a student comes nearer to its teacher, is of the shape asked for, and keeps its zeros; what cannot be is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.method.scores import divergence
from tests.method.shapes import random_model
from tests.test_conf import composed
from winnow.build import instantiate
from winnow.core.errors import UserError
from winnow.estimate.layout import dense_tensors, layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.depth import Depth, config_of_layers
from winnow.method.distill import Distill
from winnow.method.prune import Wanda
from winnow.method.student_init import slice_student, spaced_layers, student_config
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.reshape import rebuild_model
from winnow.nano.embedded import WEIGHTS

SMALL: dict[str, Any] = {"steps": 4, "tokens_per_batch": 512, "learning_rate": 3e-3, "precision": "32-true"}


def shallow(tiny: Path, run: Run) -> LM:
    return Depth(share=0.5)(pretrained(str(tiny), dtype="float32"), run).lm


@pytest.fixture
def run(run_in: Run, tiny: Path) -> Run:
    return dataclasses.replace(run_in, base=str(tiny))


@pytest.fixture(scope="module")
def shallow_nano() -> Callable[[], LM]:
    """Makes the embedded model without two of its five layers."""

    def make() -> LM:
        lm = pretrained(str(WEIGHTS))
        for index in (2, 1):
            del lm.model.model.layers[index]
        return lm.with_model(rebuild_model(lm.model, config_of_layers(lm.model.config, [0, 3, 4])))

    return make


@pytest.mark.parametrize(
    "knobs",
    [{}, {"loss": "reverse_kl", "alpha": 0.1}, {"loss": "jsd", "hidden_weight": 0.1}, {"teacher": "cached"}],
    ids=str,
)
def test_the_student_comes_nearer_to_the_model_the_pipeline_began_with(
    shallow_nano: Callable[[], LM], run: Run, knobs: dict[str, Any]
) -> None:
    run = dataclasses.replace(run, base=str(WEIGHTS))
    teacher = pretrained(str(WEIGHTS))
    stage = Distill(steps=12, tokens_per_batch=1024, learning_rate=3e-4, **knobs)
    made, notes = stage(shallow_nano(), run)
    assert divergence(made, teacher) < 0.7 * divergence(shallow_nano(), teacher)
    assert notes["teacher"]["sha256"] == teacher.sha256()
    assert notes["training"]["steps"] == 12


def test_students_of_the_same_documents_share_cached_targets(
    tiny: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = dataclasses.replace(run, cache=tmp_path / "cache")
    stage = Distill(**SMALL, teacher="cached")
    first = stage(shallow(tiny, shared), shared).lm

    def never(*arguments: Any) -> None:
        raise AssertionError("the teacher was loaded again")

    monkeypatch.setattr("winnow.training.teacher.load_frozen", never)
    second = stage(shallow(tiny, shared), shared).lm
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    # another way to cut the same documents into batches
    dataclasses.replace(stage, tokens_per_device=256)(shallow(tiny, shared), shared)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pruned_weights_stay_zero(tiny: Path, run: Run, optimizer: str) -> None:
    pruned = Wanda(pattern="2:4")(pretrained(str(tiny)), run).lm
    zero = {name: linear.weight == 0 for name, linear in linears(pruned.model).items()}
    before = {name: linear.weight.detach().clone() for name, linear in linears(pruned.model).items()}
    made = Distill(steps=3, tokens_per_batch=256, learning_rate=0.01, optimizer=optimizer)(pruned, run).lm
    for name, linear in linears(made.model).items():
        assert torch.equal(linear.weight == 0, zero[name]), name
        assert not torch.equal(linear.weight, before[name]), name
    assert made.model.dtype == torch.bfloat16


def test_teacher_and_student_are_not_the_same_model(tiny: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"teacher and student are the same model.*method\.distill\.teacher_path=FOLDER"
    ):
        Distill()(pretrained(str(tiny)), run)
    with pytest.raises(UserError, match=r"method\.distill\.teacher_path=.*no such folder"):
        Distill(teacher_path=str(tmp_path / "nowhere"))(pretrained(str(tiny)), run)


def test_another_vocabulary_is_refused(tiny: Path, run: Run, tmp_path: Path) -> None:
    other = random_model("llama", tmp_path / "other", vocab_size=2048)
    with pytest.raises(UserError, match=r"teacher_path.*different vocabularies \(2,048 and 1,024 tokens\)"):
        pipeline.check({"distill": Distill(teacher_path=str(other))}, pretrained(str(tiny)), run)


def test_hidden_states_of_another_width_are_refused(tiny: Path, run: Run, tmp_path: Path) -> None:
    wider = random_model("llama", tmp_path / "wider")
    with pytest.raises(UserError, match=r"hidden_weight.*the teacher's is 256, the student's 64"):
        stages = {"distill": Distill(teacher_path=str(wider), hidden_weight=1.0)}
        pipeline.check(stages, pretrained(str(tiny)), run)
    Distill(teacher_path=str(wider), steps=1, tokens_per_batch=64)(pretrained(str(tiny)), run)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"teacher": "cached", "loss": "reverse_kl"}, "unbiased gradient of forward_kl only"),
        ({"teacher": "cached", "hidden_weight": 1.0}, "keeps no hidden states"),
        ({"student": {"layers": 3}}, "layers cannot be set; it takes num_hidden_layers, intermediate_size"),
        ({"student": {"num_hidden_layers": 0}}, "a whole number, at least 1"),
        ({"student": 3}, "give sizes"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distill(**knobs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_hidden_layers": 3}, "more than the model's 2; it can only shrink"),
        ({"num_key_value_heads": 1, "num_attention_heads": 4}, "cannot be spread evenly"),
        ({"hidden_size": 250}, "does not take these sizes together"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_are_refused(tmp_path: Path, shape: dict[str, int], message: str) -> None:
    lm = pretrained(str(random_model("llama", tmp_path / "llama")))
    with pytest.raises(UserError, match=message):
        Distill(student=shape).predict(layout_of(lm))


def test_a_student_is_given_on_the_command_line() -> None:
    cfg = composed(
        "compress", "method=[distill]", "method.distill.student={num_hidden_layers: 3, intermediate_size: 64}"
    )
    made = instantiate(OmegaConf.create(cfg.method.distill), "method.distill")
    assert made.student == {"num_hidden_layers": 3, "intermediate_size": 64}


def test_layers_are_spaced_evenly_with_the_first_and_the_last() -> None:
    assert spaced_layers(5, 3) == [0, 2, 4]
    assert spaced_layers(32, 4) == [0, 10, 21, 31]
    assert spaced_layers(4, 4) == [0, 1, 2, 3]
    assert spaced_layers(4, 1) == [0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_student_is_a_slice_of_the_model(family: str, tmp_path: Path) -> None:
    folder = random_model(
        family, tmp_path / family, num_hidden_layers=4, **({"layer_types": None} if family == "gemma3_text" else {})
    )
    base, spent = pretrained(str(folder)), pretrained(str(folder))
    shape = {"num_hidden_layers": 3, "intermediate_size": 320, "hidden_size": 128, "num_attention_heads": 2}
    planned = Distill(student=shape).predict(layout_of(base))
    made = slice_student(spent.model, student_config(spent.model.config, shape, "student"))
    stored = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert stored == {name: t.shape for name, t in planned.tensors.items()}
    assert stored == {name: t.shape for name, t in dense_tensors(made.config).items()}
    kept = [0, 2, 3]
    for new, old in enumerate(kept):
        for part in ("mlp.down_proj", "self_attn.o_proj"):
            weight = base.model.model.layers[old].get_submodule(part).weight
            mine = made.model.layers[new].get_submodule(part).weight
            assert mine.shape[0] == 128
            assert torch.equal(mine[:, :64], weight[:128, :64])
    assert made(input_ids=torch.arange(6)[None]).logits.isfinite().all()
