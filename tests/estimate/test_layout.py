"""Plans against the models that they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import UserError
from winnow.estimate.layout import layout_of
from winnow.hardware.footprint import weights_memory_bytes
from winnow.model import manifest
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS, trained, untrained


@pytest.fixture(scope="module", params=["nano", *FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "nano":
        return WEIGHTS
    return random_model(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_a_plan_is_as_large_as_the_folder(folder: Path) -> None:
    plan = layout_of(pretrained(str(folder)))
    assert plan.disk_bytes == pytest.approx(manifest.sizes(folder)["size_bytes"], rel=0.01)
    assert plan.weight_bytes == pytest.approx(manifest.sizes(folder)["weight_bytes"], rel=0.01)


def test_a_plan_has_the_tensors_of_the_model(folder: Path) -> None:
    model = pretrained(str(folder)).model
    plan = layout_of(pretrained(str(folder)))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: t.shape for n, t in plan.tensors.items()}
    buffers = sum(b.nbytes for b in model.buffers())
    assert plan.memory_bytes == weights_memory_bytes(model) - buffers
    block = model.base_model.layers[0]
    assert sum(t.numel for t in plan.largest_block) == sum(p.numel() for p in block.parameters())


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    shutil.copy(WEIGHTS / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        pretrained(str(tmp_path))
    plan, whole = layout_of(pretrained(str(tmp_path), weights=False)), layout_of(trained())
    assert plan.weight_bytes == whole.weight_bytes
    assert plan.other_bytes < whole.other_bytes  # without the tokenizer's files


def test_weights_count_in_the_type_they_will_be_loaded_in(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    half = layout_of(pretrained(str(tmp_path)))
    assert layout_of(pretrained(str(tmp_path), dtype="float32")).weight_bytes == 2 * half.weight_bytes
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "dtype"}))
    assert layout_of(pretrained(str(tmp_path))).weight_bytes == half.weight_bytes  # as the file says


def test_a_model_in_memory_has_a_plan_too() -> None:
    settings = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "max_length": 64, "seed": 0}
    plan = layout_of(untrained(**settings, weights=False))
    assert plan.memory_bytes == 4 * sum(p.numel() for p in untrained(**settings).model.parameters())


def test_a_model_of_an_unknown_kind_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded") as caught:
        layout_of(pretrained(str(tmp_path), weights=False))
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded"):
        layout_of(pretrained(str(tmp_path), weights=False))


def test_a_plans_numbers_are_those_of_its_configuration(folder: Path) -> None:
    from transformers import Gemma3Config

    from winnow.estimate.layout import ModelLayout
    from winnow.model.spec import spec

    config = pretrained(str(folder)).model.config
    assert ModelLayout(config, {}).spec == spec(config)
    whole = Gemma3Config(
        text_config={"num_hidden_layers": 2, "dtype": "bfloat16"}, vision_config={"num_hidden_layers": 1}
    )
    assert ModelLayout(whole, {}).spec == spec(whole)
