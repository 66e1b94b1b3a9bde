"""What does not work is found before any score is paid for: in evaluation, and when an artifact has been saved."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

from winnow.core.errors import MissingExtra, Reason, Unservable, classify
from winnow.core.types import Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS, untrained
from winnow.runtime import serving
from winnow.runtime.check import check


def checked(lm: LM) -> float:
    with serving(lm) as served:
        return check(lm, served)


def nano() -> LM:
    return pretrained(str(WEIGHTS))


def pruned_without_remove(lm: LM) -> None:
    """As `torch.nn.utils.prune` leaves it without `prune.remove`: saved, its weights have names that loading does not know."""
    for module in list(lm.model.model.layers.modules()):
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)


def not_a_number(lm: LM) -> None:
    lm.model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")


def rows_shuffled(lm: LM) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data[torch.randperm(len(parameter), generator=generator)]


BROKEN = {
    pruned_without_remove: r"its weights are not those of its configuration \(missing: .*; unexpected: .*weight_mask",
    not_a_number: "in transformers its logits are not finite",
    rows_shuffled: "in transformers its perplexity on plain text is",
}


def test_what_works_passes() -> None:
    assert checked(nano()) < 3
    halved = nano()
    for module in halved.model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", 0.8)  # bad, but it works
    assert 3 < checked(halved) < 1000
    assert 900 < checked(untrained(64, 128, 2, 2, 64, seed=0)) < 1200  # a context shorter than the text


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_what_is_broken_is_unservable(damage: Callable[[LM], None], tmp_path: Path) -> None:
    lm = nano()
    damage(lm)
    lm.model.save_pretrained(tmp_path / "artifact")
    lm.tokenizer.save_pretrained(tmp_path / "artifact")
    with pytest.raises(Unservable, match=BROKEN[damage]) as caught:
        checked(pretrained(str(tmp_path / "artifact")))
    assert classify(caught.value) is Reason.UNSERVABLE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("shapes do not match"), Unservable),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (MissingExtra("hqq", "kv"), MissingExtra),
    ],
)
def test_the_model_is_blamed_for_what_it_is_to_blame_for(
    error: Exception, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = nano()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(expected):
        checked(lm)


def test_weights_that_do_not_fit_the_configuration_do_not_load(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    nano().model.save_pretrained(folder)
    nano().tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": 128}))
    with pytest.raises(Unservable):
        checked(pretrained(str(folder)))


def test_evaluation_ends_with_one_line_and_exit_code_2(command: Callable[..., Any], tmp_path: Path) -> None:
    lm = nano()
    not_a_number(lm)
    lm.model.save_pretrained(tmp_path / "artifact")
    lm.tokenizer.save_pretrained(tmp_path / "artifact")
    ended = command("evaluate", "model=local", f"model.path={tmp_path / 'artifact'}", "benchmark.limit=5")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.strip() == f"evaluate.py: {tmp_path / 'artifact'}: in transformers its logits are not finite"
    assert not (tmp_path / "outputs" / "evaluate").exists()


@dataclasses.dataclass(frozen=True)
class Spoiled(BaseStage):
    """A method whose artifact does not work."""

    slot = Slot.PRUNE

    def __call__(self, lm: LM, run: Run) -> StageResult:
        rows_shuffled(lm)
        return StageResult(lm.with_model(lm.model))


@dataclasses.dataclass(frozen=True)
class Redrawn(BaseStage):
    """A method that leaves a model as before its training: the logits are small, and perplexity is near the vocabulary."""

    slot = Slot.PRUNE

    def __call__(self, lm: LM, run: Run) -> StageResult:
        fresh = type(lm.model)(lm.model.config)
        return StageResult(lm.with_model(fresh.to(lm.model.dtype)))


def test_a_model_that_is_random_is_noticed_because_its_base_was_not(tmp_path: Path, run_in: Run) -> None:
    from winnow.method.pipeline import compress

    saved = compress(nano(), {"redrawn": Redrawn()}, run_in, tmp_path / "artifact")
    (result,) = saved.manifest["runtimes"].values()
    assert re.search(r"fails: its perplexity on plain text is [\d,]+, as that of a model drawn at random", result)
    with pytest.raises(Unservable, match=r"it is broken \(the base model's is \d\)"):
        checked(pretrained(str(saved.path)))


def test_the_manifest_lists_the_runtimes_as_tried(
    tiny: Path, tmp_path: Path, run_in: Run, log_lines: list[str]
) -> None:
    import transformers

    from winnow.method.pipeline import compress
    from winnow.method.rtn import RTN

    base = pretrained(str(tiny))
    base.model.generation_config.repetition_penalty = (
        2.0  # of which a runtime says that it is not used, but not in this check
    )
    saved = compress(base, {"rtn": RTN(group_size=32)}, run_in, tmp_path / "artifact")
    assert [line.partition(":")[0] for line in log_lines] == ["rtn", "rtn", "runtimes"]
    assert saved.manifest["runtimes"] == {"transformers": transformers.__version__}
    assert pretrained(str(tmp_path / "artifact")).manifest == saved.manifest
    assert base._model is None and saved._model is None  # neither is kept
    assert not list((tmp_path / "artifact").glob(".*"))


def test_an_artifact_that_nothing_serves_is_saved_and_says_so(
    tmp_path: Path, run_in: Run, log_lines: list[str]
) -> None:
    from winnow.method.pipeline import compress

    saved = compress(nano(), {"spoiled": Spoiled()}, run_in, tmp_path / "artifact")
    (result,) = saved.manifest["runtimes"].values()
    assert "fails: in transformers its perplexity on plain text is" in result and str(tmp_path) not in result
    assert log_lines[-1] == f"{tmp_path / 'artifact'}: saved, but no runtime serves it"
    with pytest.raises(Unservable):
        checked(pretrained(str(saved.path)))
