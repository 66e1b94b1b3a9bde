"""Long runs: what they say, how they stop and go on, and what ends them."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.logged import logged
from tests.test_conf import composed
from winnow import commands
from winnow.build.command_settings import compression
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import encode
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.training import callbacks
from winnow.training.fit import Batching, Fitted, fit
from winnow.training.module import Schedule


def train(tiny: Path, folder: Path, **settings: Any) -> tuple[Any, Fitted, list[str]]:
    """A short training; `model` and `on_line` (told of each line of progress) besides what `fit` takes."""
    on_line: Callable[[str], None] = settings.pop("on_line", lambda line: None)
    model = settings.pop("model", None) or pretrained(str(tiny), dtype="float32").model
    tokenizer = pretrained(str(tiny)).tokenizer
    rows = encode(documents(Calibration(), settings.pop("documents", 60), seed=0), tokenizer, 64)
    schedule = settings.pop("schedule", Schedule(1e-3, 6))
    batching = settings.pop("batching", Batching(256))
    run = Run(folder, **settings.pop("run", {}))
    defaults = {"log_seconds": 0, "checkpoint_minutes": 1e-9}
    with logged(on_line) as said:
        fitted = fit(model, rows, schedule, batching, run, **{**defaults, **settings})
    return model, fitted, said


def at_step(step: int, act: Callable[[], None]) -> Callable[[str], None]:
    return lambda line: act() if line.startswith(f"step {step}/") else None


def test_progress_in_a_file_is_a_line_now_and_then(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that ticks a second a step: lines every three, tokens/s over these three."""
    clock = iter(range(10_000))
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def tick(step: int, figures: Any) -> None:
        nonlocal now
        if "loss" in figures:
            points.append(figures["loss"])
            now = float(next(clock) + 1)

    points: list[float] = []
    monkeypatch.setattr(callbacks, "time", Clock)
    _, fitted, said = train(
        tiny, tmp_path, schedule=Schedule(1e-3, 8), log_seconds=3.0, checkpoint_minutes=1e9, run={"curve": tick}
    )
    lines = [line for line in said if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "7/8", "8/8"]
    losses = [float(re.findall(r"loss ([\d.]+)", line)[0]) for line in lines]
    assert losses == [pytest.approx(sum(points[a:b]) / (b - a), abs=1e-4) for a, b in ((0, 4), (4, 7), (7, 8))]
    rates = [int(re.findall(r"([\d,]+) tokens/s", line)[0].replace(",", "")) for line in lines]
    assert all(200 < 3 * rate / steps <= 256 for rate, steps in zip(rates[:2], (4, 3), strict=True))
    assert lines[0].endswith("0:00:03 left") and lines[-1].endswith("0:00:00 left")
    assert fitted.loss == points[-1]  # a tenth of eight steps is one


def test_progress_in_a_terminal_is_a_bar(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    _, _, said = train(tiny, tmp_path)
    assert re.search(r"6/6 .*loss \d\.\d{4}, [\d,]+ tokens/s", screen.getvalue())
    assert not any(line.startswith("step ") for line in said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_slurm_queues_the_job_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, log_lines: list[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as ended:
        train(tiny, tmp_path, on_line=at_step(3, lambda: os.kill(os.getpid(), number)), checkpoint_minutes=1e9)
    assert ended.value.code == 143
    assert f"{number.name}: step 3 is saved; the same command goes on from it" in log_lines
    assert (tmp_path / "asked").exists() == (number == signal.SIGUSR1)
    if number == signal.SIGUSR1:
        assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    _, fitted, _ = train(tiny, tmp_path)
    assert fitted.resumed_at_step == 3


def test_a_signal_in_the_last_step_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tiny, tmp_path, on_line=at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    (whole := tmp_path / "whole").mkdir()
    (one, first, _), (other, again, _) = (train(tiny, folder) for folder in (whole, tmp_path))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert again.loss == first.loss


def test_ctrl_c_is_an_interrupt(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path, on_line=at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def stopped(tiny: Path, folder: Path) -> Path:
    """A training's folder that was left at step 3; its checkpoint."""
    with pytest.raises(SystemExit):
        train(tiny, folder, on_line=at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    return folder / "checkpoints" / "last.ckpt"


def test_a_checkpoint_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = stopped(tiny, tmp_path)
    other = pretrained(str(tiny), dtype="float32").model
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    for settings, difference in (
        ({"schedule": Schedule(2e-3, 6)}, r"schedule\.learning_rate: 0\.001 there, 0\.002 here"),
        ({"documents": 50}, r"documents: 60 \(\w+\) there, 50 \(\w+\) here"),
        ({"batching": Batching(512, 256)}, "batches_per_step: 1 there, 2 here"),
        ({"run": {"seed": 1}}, "seed: 0 there, 1 here"),
        ({"model": other}, r"weights: \w+ there, \w+ here"),
        ({"settings": {"method.lora.rank": 8}}, "method.lora.rank: None there, 8 here"),
    ):
        with pytest.raises(UserError, match=rf"last\.ckpt is a checkpoint of another training \(.*{difference}"):
            train(tiny, tmp_path, **settings)
    whole = checkpoint.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-1000], whole[:middle], b"", whole[:middle] + bytes(64) + whole[middle + 64 :]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.ckpt is damaged or cut short; remove it"):
            train(tiny, tmp_path)
    checkpoint.write_bytes(whole)
    assert train(tiny, tmp_path)[1].resumed_at_step == 3


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped(tiny, tmp_path)
    before = checkpoint.read_bytes()
    checkpoint.with_name("last.ckpt.partial").write_bytes(before[:1000])
    assert train(tiny, tmp_path)[1].resumed_at_step == 3


def test_a_loss_that_is_not_finite_ends_it(tiny: Path, tmp_path: Path) -> None:
    model = pretrained(str(tiny), dtype="float32").model
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"

    def poison() -> None:
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")

    with pytest.raises(UserError, match=r"up_proj\.weight holds NaN or infinity after step 3; lower the learning rate"):
        train(tiny, tmp_path, model=model, on_line=at_step(3, poison))
    assert checkpoint.exists()  # of step 2
    (again := tmp_path / "again").mkdir()
    with pytest.raises(UserError, match=r"the loss is nan at step 0 on batch [0-9a-f]{12}; lower the learning rate"):
        train(tiny, again, model=model)


def test_a_learning_rate_that_is_far_too_high_ends_it(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(the loss is (nan|inf) at step \d+ on batch|holds NaN).*learning rate"):
        train(tiny, tmp_path, schedule=Schedule(1e30, 20, warmup=0), checkpoint_minutes=1e9)


def test_early_stopping_keeps_the_best_weights(tiny: Path, tmp_path: Path) -> None:
    """On ten documents that are soon learned by heart."""
    points: dict[int, float] = {}
    kept: dict[int, list[torch.Tensor]] = {}
    model = pretrained(str(tiny), dtype="float32").model

    def curve(step: int, figures: Any) -> None:
        if "held_out_loss" in figures:
            points[step] = figures["held_out_loss"]
            kept[step] = [p.detach().clone() for p in model.parameters()]

    _, fitted, said = train(
        tiny,
        tmp_path,
        model=model,
        documents=30,
        batching=Batching(128, held_out=20, patience=2),
        schedule=Schedule(1e-2, 100),
        checkpoint_minutes=1e9,
        run={"curve": curve},
    )
    best = min(points, key=points.__getitem__)
    assert fitted.steps == best + 20 < 100
    assert fitted.held_out_loss == points[best] < points[0] == fitted.held_out_loss_before
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), kept[best], strict=True))
    assert any(f"stopped at step {best + 20}, step {best} is kept" in line for line in said)


def test_train_py_is_stopped_and_goes_on(tiny: Path, tmp_path: Path, repository: Path) -> None:
    """As a user sees it: SIGTERM, exit code 143, the same command again; and what a wrong checkpoint makes of it."""
    arguments = [
        "model=local",
        f"model.path={tiny}",
        "method=[pretrain]",
        "method.pretrain.stream=200",
        "method.pretrain.steps=400",
        "method.pretrain.tokens_per_batch=256",
        "method.pretrain.precision=32-true",
        "method.pretrain.checkpoint_minutes=0.001",
        f"output={tmp_path / 'artifact'}",
        f"outputs={tmp_path / 'outputs'}",
    ]

    line = [sys.executable, str(repository / "train.py"), *arguments]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        while not list(tmp_path.glob("outputs/scratch/*/checkpoints/last.ckpt")) and process.poll() is None:
            signal.sigtimedwait([], 0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143, said
    (step,) = re.findall(r"SIGTERM: step (\d+) is saved; the same command goes on from it", said)
    assert not (tmp_path / "artifact").exists()

    with pytest.raises(UserError, match=r"method\.pretrain\.learning_rate: 0\.003 there, 0\.1 here"):
        changed = composed("train", *arguments, "method.pretrain.learning_rate=0.1")
        commands.compress(compression(changed, "train"))

    commands.compress(compression(composed("train", *arguments), "train"))
    (record,) = pretrained(str(tmp_path / "artifact")).manifest["stages"]
    assert record["training"]["resumed_at_step"] == int(step) and record["training"]["steps"] == 400
    assert not (tmp_path / "outputs" / "scratch").exists()


def test_killed_runs_end_with_the_same_weights(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    kill_case = importlib.import_module("kill_case")
    found = kill_case.measure(kills=2)
    assert found["kills"] == found["survived"] == 2
