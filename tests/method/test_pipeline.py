"""What a later stage of a pipeline cannot do is refused before the first has begun."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.method.test_conformance import METHODS, stage_of
from tests.wild.architectures import random_model
from winnow.core.errors import UserError
from winnow.core.libraries import is_installed
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.depth import Depth
from winnow.method.distill import Distill
from winnow.method.gguf import GGUF
from winnow.method.knobs import Stage
from winnow.method.kv import KV
from winnow.method.lora import Lora
from winnow.method.oneshot import AWQ
from winnow.method.oneshot_8bit import FP8, SmoothQuant
from winnow.method.prune import Magnitude
from winnow.method.qlora import QLoRA
from winnow.method.rtn import RTN
from winnow.method.soft_prompt import SoftPrompt
from winnow.method.width import Width
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS

Refusal = Callable[..., str]


@pytest.fixture
def refusal(run_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """The message with which a pipeline is refused, none of whose stages may begin."""

    def begin(*arguments: Any) -> Any:
        raise AssertionError("the first stage has begun")

    monkeypatch.setattr(pipeline, "apply", begin)

    def refused(base: Path, *stages: Stage) -> str:
        with pytest.raises(UserError) as error:
            pipeline.compress(
                pretrained(str(base)), {type(s).__name__.lower(): s for s in stages}, run_in, tmp_path / "artifact"
            )
        assert not (tmp_path / "artifact").exists()
        return str(error.value)

    return refused


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((Depth(0.5), RTN(4, 128)), "group_size=128 does not divide the width 192"),
        ((Magnitude(), Lora(targets=["nothing"])), "method.lora.targets: nothing is no linear layer"),
        ((Magnitude(), SoftPrompt(tokens=128)), "method.soft_prompt.tokens=128 leaves no room for text"),
        ((Width(hidden=0.5, multiple=16), Distill(hidden_weight=1.0)), "method.distill.hidden_weight compares hidden"),
        ((RTN(4, 32), QLoRA()), "packed by compressed-tensors; write method=[nf4,qlora]"),
        ((FP8(), SoftPrompt()), "no gradient reaches the prompt"),
        ((SmoothQuant(), SoftPrompt()), "no gradient reaches the prompt"),
        ((Magnitude(), Distill(teacher_path=str(WEIGHTS / "lost"))), "method.distill.teacher_path"),
    ],
    ids=lambda value: "-".join(type(s).__name__ for s in value) if isinstance(value, tuple) else "",
)
def test_what_a_later_stage_cannot_work_on(
    stages: tuple[Stage, ...], says: str, tmp_path: Path, refusal: Refusal
) -> None:
    base = random_model("llama", tmp_path / "base", hidden_size=192, max_position_embeddings=128)
    assert says in refusal(base, *stages)


@pytest.mark.skipif(not is_installed("llmcompressor"), reason="needs the extra [llmcompressor]")
@pytest.mark.parametrize("stage", [AWQ(), SmoothQuant()], ids=lambda stage: type(stage).__name__)
def test_architectures_that_the_library_does_not_know(stage: Stage, tmp_path: Path, refusal: Refusal) -> None:
    base = random_model("stablelm", tmp_path / "base")
    assert "does not know which layers of StableLmForCausalLM feed which" in refusal(base, Magnitude(), stage)


@pytest.mark.parametrize("method", [name for name in METHODS if stage_of(name).libraries])
def test_a_library_that_is_not_installed(
    method: str, tiny: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any method, and its message names the extra that brings it."""
    stage, find = stage_of(method), importlib.util.find_spec
    library = stage.libraries[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    assert "is not installed; install it with: pip install 'winnow[" in refusal(tiny, stage)


def test_nothing_comes_after_a_file_for_a_runtime() -> None:
    for stage in (KV(), SoftPrompt()):
        with pytest.raises(UserError, match=r"gguf writes the file that a runtime loads.*leave one of them out"):
            pipeline.check_order({"gguf": GGUF(), type(stage).__name__.lower(): stage})
