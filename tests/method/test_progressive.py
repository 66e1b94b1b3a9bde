"""`progressive`: the rounds lead exactly to where the pruner alone would go, and a killed run goes on at its round."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.logged import logged
from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.method.depth import Depth
from winnow.method.progressive import Progressive
from winnow.method.prune import Magnitude
from winnow.method.width import Width
from winnow.model.layers import linears
from winnow.model.pretrained import pretrained

QUICK: dict[str, Any] = {"steps": 2, "tokens_per_batch": 256, "learning_rate": 1e-3, "precision": "32-true"}


def config(layers: int = 32, channels: int = 14336) -> Any:
    return AutoConfig.for_model(
        "llama", num_hidden_layers=layers, intermediate_size=channels, hidden_size=4096, num_attention_heads=32
    )


@pytest.mark.parametrize("layers", [2, 5, 24, 32, 80, 126])
@pytest.mark.parametrize("amount", [0.05, 0.3, 0.75])
@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_depth_ends_with_as_many_layers_as_the_pruner_alone_leaves(layers: int, amount: float, rounds: int) -> None:
    stages = Progressive(amount=amount, rounds=rounds).schedule(config(layers))
    left = [layers]
    for stage in stages:
        left.append(stage.remaining_layers(left[-1]))
    assert left[-1] == Depth(share=amount).remaining_layers(layers)
    assert 1 <= len(stages) <= rounds
    assert left == sorted(set(left), reverse=True)
    if layers == 32 and amount == 0.3 and rounds == 3:
        assert left == [32, 29, 25, 22]


@pytest.mark.parametrize("channels", [768, 11008, 14336])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("rounds", [1, 4])
def test_width_ends_with_as_many_channels_as_the_pruner_alone_leaves(channels: int, amount: float, rounds: int) -> None:
    now = config(channels=channels)
    wanted = Width(mlp=1 - amount).narrow_config(now).intermediate_size
    for stage in Progressive(pruner="width", amount=amount, rounds=rounds).schedule(now):
        after = stage.narrow_config(now)
        assert after.intermediate_size < now.intermediate_size
        now = after
    assert now.intermediate_size == wanted


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_sparsity_rises_to_exactly_the_target(pruner: str) -> None:
    found = [stage.sparsity for stage in Progressive(pruner=pruner, amount=0.7, rounds=3).schedule(config())]
    assert found == [pytest.approx(0.7 / 3), pytest.approx(1.4 / 3), 0.7]


def test_zeros_are_as_many_as_the_pruner_alone_makes(tiny: Path, run_in: Run) -> None:
    made, notes = Progressive(pruner="magnitude", amount=0.5, rounds=2, **QUICK)(pretrained(str(tiny)), run_in)
    alone = Magnitude(sparsity=0.5)(pretrained(str(tiny)), run_in).lm
    for (name, mine), theirs in zip(linears(made.model).items(), linears(alone.model).values(), strict=True):
        assert (mine.weight == 0).sum() == (theirs.weight == 0).sum(), name
    assert [r["training"]["steps"] for r in notes["rounds"]] == [2, 2]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("teacher", ["online", "cached"])
def test_a_killed_run_goes_on_at_its_round(
    tiny: Path, run_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    stage = Progressive(pruner="width", amount=0.5, rounds=2, teacher=teacher, **QUICK)
    monkeypatch.setattr(Progressive, "_pruner_at", lambda self, amount: Width(mlp=1 - amount, multiple=32))

    def run(name: str) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        return dataclasses.replace(run_in, folder=tmp_path / name)

    def die(line: str) -> None:
        if "round 2" in line:
            raise Killed

    whole = stage(pretrained(str(tiny)), run("whole"))
    with pytest.raises(Killed), logged(die):
        stage(pretrained(str(tiny)), run("cut"))
    assert list((tmp_path / "cut").rglob("*.ckpt"))  # by which the folder is kept
    with logged() as said:
        resumed = stage(pretrained(str(tiny)), run("cut"))
    assert "progressive: going on after round 1 of 2" in said
    assert not any("round 1 of 2: " in line for line in said)
    for name, weight in whole.lm.model.state_dict().items():
        assert torch.equal(weight, resumed.lm.model.state_dict()[name]), name
    told = [[r["intermediate_size"] for r in made.notes["rounds"]] for made in (whole, resumed)]
    assert told == [[96, 64], [96, 64]]


def test_a_model_without_a_folder_has_no_teacher(tiny: Path, run_in: Run) -> None:
    lm = pretrained(str(tiny))
    with pytest.raises(UserError, match="load as teacher"):
        Progressive()(lm.with_model(lm.model), run_in)
