"""What calibration tells of a model is computed once, as long as nothing has changed that it follows from."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method import calibration_statistics, depth, importance
from winnow.method.depth import Depth
from winnow.method.knobs import Stage
from winnow.method.prune import Magnitude, Pruning, Wanda
from winnow.method.width import Width
from winnow.model.pretrained import pretrained


@pytest.fixture
def run(tmp_path: Path) -> Run:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Run(scratch, calibration=Calibration(samples=4), cache=tmp_path / "cache")


def test_what_a_trial_has_computed_another_reads(tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Depth(0.4)(pretrained(str(tiny)), run)
    monkeypatch.setattr(depth, "block_influences", lambda *args: pytest.fail("computed again"))
    elsewhere = dataclasses.replace(run, folder=run.folder / "of another trial")
    again = Depth(0.4)(pretrained(str(tiny)), elsewhere)
    assert again.notes == first.notes
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        Depth(0.4)(pretrained(str(tiny)), dataclasses.replace(run, calibration=Calibration(samples=5)))
    changed = pretrained(str(tiny))
    changed.model.model.norm.weight.data[0] += 1
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        Depth(0.4)(changed, run)
    otherwise_normed = pretrained(str(tiny))
    otherwise_normed.model.config.rms_norm_eps *= 10
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        Depth(0.4)(otherwise_normed, run)
    moved = pretrained(str(shutil.copytree(tiny, run.folder / "moved")))
    assert Depth(0.4)(moved, run).notes == first.notes


@pytest.mark.parametrize(
    ("stage", "computing"),
    [
        (Wanda(sparsity=0.6, allocation="owl"), (Pruning, "_scores")),
        (Wanda(sparsity=0.6, allocation="global"), (Pruning, "_scores")),
        (Magnitude(sparsity=0.6, allocation="owl"), (Pruning, "_scores")),
        (Width(mlp=0.5, heads=0.5, hidden=0.75, multiple=16), (importance, "importances")),
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'allocation', '')}" if isinstance(v, Stage) else "",
)
def test_from_what_is_kept_comes_the_same_model(
    stage: Stage, computing: tuple[object, str], tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage(pretrained(str(tiny)), run).lm.model
    monkeypatch.setattr(*computing, lambda *args: pytest.fail("computed again"))
    again = stage(pretrained(str(tiny)), run).lm.model
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_least_recently_used_go_first(tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretrained(str(tiny)).model

    def ask(name: str, value: float = 0.0) -> float:
        found = calibration_statistics.cached_statistics(
            model, run, "some", (name,), lambda: {"x": torch.full((1000,), value)}
        )
        for age, path in enumerate(
            sorted((run.cache or run.folder).glob("statistics/*"), key=lambda p: p.stat().st_mtime)
        ):
            os.utime(path, (1e9 + age, 1e9 + age))  # in the same order, but clearly apart
        return float(found["x"][0])

    monkeypatch.setattr(calibration_statistics, "MOST_BYTES", 10_000)  # two of them
    ask("a", 1.0)
    ask("b", 2.0)
    assert ask("a") == 1.0
    ask("c", 3.0)
    assert ask("a") == 1.0, "used after b was"
    assert ask("b", 4.0) == 4.0
