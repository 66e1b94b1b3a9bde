"""Searches whose trials real launchers run: joblib, Ray, and submitit on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.quick import MEASUREMENTS
from tests.search import kills, small_search
from winnow.core.errors import Reason
from winnow.study.opening import open_study

LAUNCHERS = {
    "joblib": ("joblib", "hydra_plugins.hydra_joblib_launcher"),
    "submitit_local": ("slurm", "hydra_plugins.hydra_submitit_launcher"),
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher"),
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    extra, module = LAUNCHERS[name]
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'winnow[{extra}]'")
    return name


def start(folder: Path, launcher: str, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "tests.search.launched", f"hydra/launcher={launcher}", "workers=2", "study=s"]
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [*line, f"outputs={folder}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "HOME": str(folder)},  # Ray leaves a token there
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def search(folder: Path, launcher: str, *arguments: str) -> str:
    """What it said until its end."""
    process = start(folder, launcher, *arguments)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    return said


def recorded(folder: Path) -> list[Any]:
    study = open_study("small", small_search.address(folder / "s"), small_search.OBJECTIVES, {"model": {"name": "m"}})
    return list(study.trials)


def test_trials_run_in_processes_of_their_own_and_one_that_dies_is_tried_again(launcher: str, tmp_path: Path) -> None:
    search(tmp_path, launcher, "+crash=true", f"budget.trials={small_search.TRIALS}")
    trials = recorded(tmp_path)
    assert sum(trial.complete for trial in trials) == small_search.TRIALS
    (died,) = [trial for trial in trials if not trial.complete and trial.strategy.methods == ("nf4",)]
    assert died.reason is Reason.LOST
    assert died.message.startswith(launcher)
    (second,) = [trial for trial in trials if trial.decision.get("retried") == died.number]
    assert second.complete
    jobs = [json.loads(line) for line in (tmp_path / "s" / "jobs.jsonl").read_text().splitlines()]
    assert {given for given, _ in jobs} == {"worker 0", "worker 1"}, "the worker's variables came along"
    assert len({pid for _, pid in jobs}) >= 2
    assert (tmp_path / "s" / "trials" / "0" / ".hydra" / "overrides.yaml").exists()


def test_interrupted_it_leaves_no_job_running(launcher: str, tmp_path: Path) -> None:
    process = start(tmp_path, launcher, "+seconds=600")
    deadline = time.monotonic() + 1200
    while len(kills.lines(tmp_path / "s" / "started.jsonl")) < 3:  # the base model, and two that will not end
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert [trial.number for trial in recorded(tmp_path)] == [0], (recorded(tmp_path)[1:], said)
    assert (tmp_path / "s" / "front.json").exists()


def test_a_launcher_that_cannot_start_anything_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: pip install 'winnow[slurm]'")
    with pytest.raises(AssertionError, match=r"search.py: the base model .*submitit_slurm: .*srun"):
        search(tmp_path, "submitit_slurm")


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(command: Callable[..., Any]) -> None:
    done = command("search", "hydra/launcher=rq")
    assert done.returncode == 2
    assert "hydra/launcher=rq" in done.stderr
    assert "joblib" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_whole_search_with_two_workers(launcher: str, command: Callable[..., Any], tmp_path: Path) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'winnow[joblib]'")
    settings = ["method=[rtn]", "agent=random", "budget.trials=4", "first_slots=[]", "benchmark.limit=2"]
    settings += ["objectives=[accuracy,size_bytes]", *MEASUREMENTS, "wandb.mode=disabled", "study=s"]
    done = command("search", f"hydra/launcher={launcher}", "workers=2", *settings)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(path.read_text()) for path in (tmp_path / "outputs/s/trials").glob("*/outcome.json")]
    assert len(outcomes) == 4
    assert all(outcome["reason"] is None and "accuracy" in outcome["figures"] for outcome in outcomes)
