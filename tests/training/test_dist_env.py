"""Trainings on several devices: two gloo processes stand for two devices."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from winnow.core.errors import RankLost, UserError
from winnow.core.types import Calibration
from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.method.lora import Lora
from winnow.method.prune import Wanda
from winnow.model.lm import LM
from winnow.training import dist_env, torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHORT = ["method.lora.tokens_per_batch=256", "method.lora.max_length=64", "method.lora.precision=32-true"]


def case() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddp_case", REPOSITORY / "bench" / "ddp_case.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    found: dict[str, str] = case().environment()
    return found


def arguments(tiny: Path, outputs: Path, *more: str) -> list[str]:
    model = ["model=local", f"model.path={tiny}", f"outputs={outputs}", "hardware=cpu", "hardware.devices=2"]
    return [str(REPOSITORY / "train.py"), *model, "method=lora", *SHORT, *more]


def run_train(tiny: Path, outputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [*TORCHRUN, *arguments(tiny, outputs, *more)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=170, check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("parallel", "lora"), [("ddp", False), pytest.param("fsdp", True, marks=pytest.mark.slow)])
def test_two_processes_make_the_step_that_one_makes(parallel: str, lora: bool) -> None:
    assert case().measure(parallel, lora) <= 1e-6


@pytest.mark.slow
def test_sharded_training_ends_where_replicated_training_does_and_goes_on_after_a_stop(
    tiny: Path, tmp_path: Path
) -> None:
    steps = "method.lora.steps=12"
    for parallel in ("ddp", "fsdp"):
        ended = run_train(tiny, tmp_path, steps, f"output={tmp_path / parallel}", f"hardware.parallel={parallel}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ("weights sharded" in ended.stderr) == (parallel == "fsdp")
        assert ended.stderr.count("lora: done") == 1  # one process speaks
    ours, reference = weights(tmp_path / "fsdp"), weights(tmp_path / "ddp")
    assert ours.keys() == reference.keys()
    base = weights(tiny)
    moved = sum((reference[k].float() - base[k].float()).norm() for k in base)
    apart = sum((ours[k].float() - reference[k].float()).norm() for k in base)
    assert apart < 0.02 * moved


@pytest.mark.slow
def test_a_checkpoint_of_sharded_weights_is_gone_on_from(tiny: Path, tmp_path: Path) -> None:
    more = ("method.lora.steps=200", "method.lora.checkpoint_minutes=0.001", "hardware.parallel=fsdp")
    output = f"output={tmp_path / 'artifact'}"
    line = [*TORCHRUN, *arguments(tiny, tmp_path, *more, output)]
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment()
    ) as child:
        wait_for(lambda: any((tmp_path / "scratch").rglob("last.ckpt")))
        child.terminate()
        child.communicate(timeout=100)
    assert not (tmp_path / "artifact").exists()
    ended = run_train(tiny, tmp_path, *more, output)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    training = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["stages"][-1]["training"]
    assert 0 < training["resumed_at_step"] < training["steps"] == 200
    assert not list(tmp_path.glob("scratch/*"))


def wait_for(true: Any, seconds: float = 150) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def workers_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True) if "RANK" in child.environ()]


def test_a_rank_that_is_killed_ends_the_pipeline_with_one_message(tiny: Path, tmp_path: Path) -> None:
    line = [sys.executable, *arguments(tiny, tmp_path, "method.lora.steps=3000")]
    line += ["method.lora.checkpoint_minutes=0.001", f"output={tmp_path / 'artifact'}"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as child:
        wait_for(lambda: any((tmp_path / "scratch").rglob("last.ckpt")))
        workers = workers_of(child.pid)
        assert len(workers) == 2
        victim = next(pid for pid in workers if rank_of(pid) == "1")
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        _, told = child.communicate(timeout=100)
    assert time.monotonic() - started < 60
    assert child.returncode == 1
    last = told.strip().splitlines()[-1]
    assert last.startswith("train.py: lora: rank 1 of the training was killed by SIGKILL")
    assert not any(alive(pid) for pid in workers)
    assert not (tmp_path / "artifact").exists()


def rank_of(pid: int) -> str:
    import psutil

    return str(psutil.Process(pid).environ()["RANK"])


def alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_another_number_of_processes_than_devices_is_refused(tiny: Path, tmp_path: Path) -> None:
    ended = run_train(tiny, tmp_path, "hardware.devices=3")
    assert ended.returncode != 0
    assert "hardware.devices=3; start as many as there are devices" in ended.stderr
    assert "exitcode  : 2" in ended.stderr
    assert not (tmp_path / "artifact").exists()


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_env, "end_with_parent", lambda: None)


@pytest.mark.usefixtures("ranked")
def test_devices_are_counted_on_each_machine() -> None:
    found = dist_env.enter(Hardware("cpu", devices=2), {"lora": Lora()})
    assert (found.size, found.nodes, found.is_rank_zero) == (4, 2, False)
    with pytest.raises(UserError, match=r"hardware\.devices=4; start as many"):
        dist_env.enter(Hardware("cpu", devices=4), {"lora": Lora()})


@pytest.mark.usefixtures("ranked")
def test_stages_that_do_not_train_are_refused_under_torchrun() -> None:
    with pytest.raises(UserError, match="wanda is no training.*compress.py without torchrun"):
        dist_env.enter(Hardware("cpu", devices=2), {"wanda": Wanda(), "lora": Lora()})


@pytest.mark.usefixtures("ranked")
def test_a_child_sees_nothing_of_the_ranks_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("HF_HOME", "/models")
    found = torchrun.child_environment(Run(tmp_path, devices=2))
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    assert not [name for name in found if name.startswith(ranks)]
    assert found["HF_HOME"] == "/models"


def test_only_trainings_are_spread_and_only_over_several_devices(tmp_path: Path) -> None:
    assert torchrun.needs_torchrun(Lora(), Run(tmp_path, devices=2))
    assert not torchrun.needs_torchrun(Lora(), Run(tmp_path))
    assert not torchrun.needs_torchrun(Wanda(), Run(tmp_path, devices=2))


def test_the_childs_command_line_makes_the_same_stage_and_run(tiny: Path, tmp_path: Path) -> None:
    from tests.test_conf import composed
    from winnow import build

    stage = Lora(targets=["q_proj", "v_proj"], learning_rate=3e-5, dora=True)
    calibration = Calibration(source="/a folder/it's, here=\\.jsonl", samples=7)
    run = Run(tmp_path, seed=3, devices=2, calibration=calibration, carbon_g_per_kwh=50, cache=tmp_path / "o" / "cache")
    lines = torchrun.overrides("lora", stage, str(tiny), LM(tiny), run, tmp_path / "artifact")
    cfg = composed("train", *lines)
    assert build.stages(cfg) == {"lora": stage}
    assert cfg.calibration.source == calibration.source and cfg.calibration.samples == 7
    assert (cfg.seed, cfg.hardware.devices, cfg.hardware.carbon_g_per_kwh) == (3, 2, 50)
    assert (cfg.model.path, cfg.output, cfg.outputs) == (str(tiny), str(tmp_path / "artifact"), str(tmp_path / "o"))


def test_a_pipeline_starts_torchrun_for_the_stage_that_trains(tiny: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "compress.py"), *arguments(tiny, tmp_path, "method.lora.steps=4")[1:]]
    line = [x if x != "method=lora" else "method=[magnitude,lora]" for x in line] + [f"output={tmp_path / 'artifact'}"]
    ended = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=170, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 4/4" in ended.stderr  # the child's lines
    assert (
        ended.stderr.count("lora: done") == 2
    )  # once from the first process of the training, and once from the pipeline
    made = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    pruned, trained = made["stages"]
    assert (pruned["method"], trained["method"], trained["devices"]) == ("magnitude", "lora", 2)
    assert trained["training"]["steps"] == 4 and trained["energy_wh"] > 0
    found = weights(tmp_path / "artifact")["model.layers.0.mlp.down_proj.weight"]
    assert (found == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert not list(tmp_path.glob("scratch/*"))


def test_what_a_child_refuses_is_refused_in_its_words() -> None:
    lines = ["train.py: no such thing", "Root Cause (first observed failure):", "  rank      : 0 (local_rank: 0)"]
    found = torchrun._failure("lora", 1, [*lines, "  exitcode  : 2 (pid: 5)"], 0)
    assert isinstance(found, UserError) and str(found) == "no such thing"
    killed = torchrun._failure("lora", 1, [*lines[1:], "  exitcode  : -9 (pid: 5)"], 0)
    assert isinstance(killed, RankLost) and "rank 0 of the training was killed by SIGKILL" in str(killed)
    stopped = torchrun._failure("lora", 1, [], signal.SIGTERM)
    assert isinstance(stopped, SystemExit) and stopped.code == 143
