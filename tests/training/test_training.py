"""A training as a whole: it learns, it says what it did, and one that is cut off goes on as if it was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logged import logged
from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import encode
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.lora import Lora, add_adapters
from winnow.method.pretrain import Pretrain
from winnow.model.pretrained import pretrained
from winnow.training.fit import Batching, Fitted, fit
from winnow.training.module import Schedule

STEPS = 12


class Cut(Exception):
    """The training was cut off."""


def trained(
    tiny: Path,
    folder: Path,
    cut_after: int | None = None,
    wrap: Callable[[Any], Any] = lambda model: model,
    optimizer: str = "adamw",
    batching: Batching | None = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], Fitted]:
    """The weights after `STEPS` steps with a checkpoint after each; raises Cut once `cut_after` steps are done."""
    lm = pretrained(str(tiny), dtype="float32")
    rows = encode(documents(Calibration(), 60, seed=0), lm.tokenizer, 64)
    folder.mkdir(exist_ok=True)

    def cut(line: str) -> None:
        if cut_after is not None and line.startswith(f"step {cut_after + 1}/"):
            raise Cut

    model = wrap(lm.model)
    with logged(cut):
        fitted = fit(
            model,
            rows,
            Schedule(settings.pop("learning_rate", 1e-2), settings.pop("steps", STEPS), optimizer=optimizer),
            batching or Batching(512, 256),
            Run(folder, **settings),
            checkpoint_minutes=1e-9,
            log_seconds=0,
        )
    return {k: v.detach().clone() for k, v in model.state_dict().items()}, fitted


def lora(model: Any) -> Any:
    made = add_adapters(model, Lora(rank=4, dora=True), 0)
    for module in made.modules():  # random numbers are drawn in each step: their state must come back too
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return made


@pytest.mark.parametrize(
    ("optimizer", "wrap", "batching"),
    [
        ("adamw", None, Batching(512, 256)),
        ("muon", None, Batching(300)),
        ("adamw", lora, Batching(512, 128)),
        ("adamw", None, Batching(512, 256, held_out=8, patience=10)),
    ],
    ids=["adamw", "muon", "lora", "held-out"],
)
def test_a_training_that_is_cut_off_goes_on_bit_for_bit(
    tiny: Path, tmp_path: Path, optimizer: str, wrap: Any, batching: Batching
) -> None:
    """Cut off twice, both in the middle of an epoch (of some five steps)."""
    settings: dict[str, Any] = {"optimizer": optimizer, "batching": batching, "wrap": wrap or (lambda model: model)}
    whole, undisturbed = trained(tiny, tmp_path / "whole", **settings)
    for cut_after in (3, 8):
        with pytest.raises(Cut):
            trained(tiny, tmp_path / "cut", cut_after, **settings)
    resumed, fitted = trained(tiny, tmp_path / "cut", **settings)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (fitted.resumed_at_step, undisturbed.resumed_at_step) == (8, None)
    assert (fitted.loss, fitted.held_out_loss, fitted.held_out_loss_before, fitted.steps) == (
        undisturbed.loss,
        undisturbed.held_out_loss,
        undisturbed.held_out_loss_before,
        undisturbed.steps,
    )


def test_schedule_warms_up_holds_and_ends_at_zero() -> None:
    schedule = Schedule(1.0, 100, warmup=0.1, decay=0.2)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_the_record_says_what_was_trained_and_what_it_took(tiny: Path, tmp_path: Path, log_lines: list[str]) -> None:
    points: list[tuple[int, dict[str, float]]] = []
    run = Run(
        tmp_path,
        calibration=Calibration(),
        carbon_g_per_kwh=20.0,
        curve=lambda step, figures: points.append((step, dict(figures))),
    )
    stage = Pretrain(
        steps=20, stream=400, tokens_per_batch=512, precision="32-true", max_length=64, held_out=20, learning_rate=1e-2
    )
    lm = pipeline.apply(pretrained(str(tiny)), {"pretrain": stage}, run)
    (record,) = lm.manifest["stages"]
    training = record["training"]
    assert training["held_out_loss"] < training["held_out_loss_before"] - 0.5
    losses = [figures["loss"] for _, figures in points if "loss" in figures]
    assert training["loss"] == pytest.approx(sum(losses[-2:]) / 2)
    assert training["steps"] == 20 and training["tokens_per_second"] > 0
    assert 0 < training["seconds"] <= record["seconds"]
    assert record["energy_source"] in ("counter", "estimated")
    assert record["co2_g"] == pytest.approx(record["energy_wh"] / 1000 * 20.0) and record["energy_wh"] > 0
    assert any("documents are longer than 64 tokens and were cut" in line for line in log_lines)
    assert [step for step, figures in points if "loss" in figures] == list(range(1, 21))
    held = {step: figures["held_out_loss"] for step, figures in points if "held_out_loss" in figures}
    assert list(held) == list(range(0, 21, 2))
    assert held[0] == training["held_out_loss_before"] and held[20] == training["held_out_loss"]
