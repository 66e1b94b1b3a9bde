"""A study of one model never takes the figures of another: whatever file decides answers was changed under the same path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quick import MEASUREMENTS
from tests.started import run
from tests.wild.edits import Edit, setting, tensors, written
from winnow.model.pretrained import pretrained


def tokenizer(folder: Path) -> None:
    """Two tokens change places."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


CHANGES: dict[str, Edit] = {
    "weights": tensors(lambda held: {name: torch.roll(tensor, 1, 0) for name, tensor in held.items()}),
    "configuration": setting("config.json", rms_norm_eps=0.1),
    "tokenizer": tokenizer,
    "tokenizer's settings": setting("tokenizer_config.json", add_bos_token=True),
    "chat template": written("chat_template.jinja", "{{ messages }}"),
    "generation settings": setting("generation_config.json", repetition_penalty=1.5),
    "prompt": written("prompt.json", '{"instruction": "Think."}'),
}


@pytest.fixture(scope="module")
def studied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a study of it."""
    folder = tmp_path_factory.mktemp("studied")
    shutil.copytree(tiny, folder / "model")
    done = search(folder)
    assert done.returncode == 0, done.stderr
    assert "known from an earlier study" not in done.stderr
    return folder


def search(folder: Path, *more: str) -> Any:
    settings = [
        "model=local",
        f"model.path={folder / 'model'}",
        "method=[rtn]",
        "benchmark.limit=2",
        "study=s",
        *MEASUREMENTS,
    ]
    return run("search.py", *settings, f"outputs={folder / 'outputs'}", "budget.trials=1", "wandb.mode=disabled", *more)


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_known_by_another_name(tiny: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    before = pretrained(str(folder)).sha256()
    assert pretrained(str(tiny)).sha256() == before
    CHANGES[change](folder)
    assert pretrained(str(folder)).sha256() != before


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_a_study_of_one_model_does_not_go_on_with_another(studied: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(studied, tmp_path / "studied"))
    CHANGES[change](folder / "model")
    done = search(folder)
    assert done.returncode == 2 and "model.sha256" in done.stderr, done.stderr


def test_outcomes_that_are_known_are_of_the_same_model(studied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(studied, tmp_path / "studied"))  # the copy is the same model
    assert "known from an earlier study" in search(folder, "study=again").stderr
    tokenizer(folder / "model")
    assert "known from an earlier study" not in search(folder, "study=other").stderr
