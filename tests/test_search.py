"""The whole way: a real search on the embedded model, its files, its reproducibility, its ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.quick import MEASUREMENTS
from tests.started import run

REPOSITORY = Path(__file__).resolve().parents[1]
SEARCH = [
    "method=[wanda,lora,rtn]",
    "method.lora.steps=2",
    "benchmark.limit=6",
    "first_slots=[]",
    "agent=tpe",
    "agent.startup_trials=2",
    "keep=all",
    "study=small",
    "racing.error_rate=0",
    "racing.hopeless_ratio=0",
    *MEASUREMENTS,
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of five trials."""
    folder = tmp_path_factory.mktemp("search") / "outputs"
    ended = run("search.py", *SEARCH, f"outputs={folder}", "budget.trials=5")
    assert ended.returncode == 0, ended.stderr
    assert "report: " in ended.stdout
    return folder


@pytest.fixture(scope="module")
def results(outputs: Path) -> dict:
    return json.loads((outputs / "small" / "final_results.json").read_text())


def test_a_study_leaves_its_files(outputs: Path, results: dict) -> None:
    study = outputs / "small"
    for name in ("study.db", "front.json", "model_spec.json", "final_results.json", "report.html"):
        assert (study / name).stat().st_size > 0, name
    assert len(results["trials"]) == 5
    for trial in results["trials"]:
        folder = study / "trials" / str(trial["trial"])
        assert (folder / ".hydra" / "config.yaml").exists()
        for name in ("manifest.json", "metrics.json", "samples.parquet"):
            assert (folder / name).stat().st_size > 0, name
        assert json.loads((folder / "metrics.json").read_text())["runtime_mode"] == "eager"
        assert not list(folder.rglob("*.partial*"))


def test_the_base_model_is_trial_0_and_all_figures_have_a_source(results: dict) -> None:
    base = results["trials"][0]
    assert base["trial"] == 0
    assert base["strategy"] == "base"
    for trial in results["trials"]:
        assert set(trial["figures"]) == set(trial["sources"])
        assert trial["sources"]["energy_wh_per_1k_tokens"] in ("counter", "estimated")
        assert trial["figures"]["size_bytes"] > 1e6


def test_trials_can_be_made_again_bit_for_bit(
    outputs: Path, results: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    every = request.config.getoption("--all-shapes")  # else the last two: each takes 10 s and more
    for trial in results["trials"] if every else results["trials"][-2:]:
        artifact = outputs / "small" / "trials" / str(trial["trial"]) / "artifact"
        copy = tmp_path / str(trial["trial"])
        compress, evaluate = (
            [word.replace(str(artifact), str(copy)) for word in shlex.split(line)[1:]] for line in trial["commands"]
        )
        made = run(*compress)
        assert made.returncode == 0, made.stderr
        weights = [(folder / "model.safetensors").read_bytes() for folder in (artifact, copy)]
        assert weights[0] == weights[1], trial["commands"][0]
        scored = run(*evaluate, f"output={tmp_path / 'metrics'}")
        assert scored.returncode == 0, scored.stderr
        figures = json.loads((tmp_path / "metrics" / "metrics.json").read_text())["figures"]
        for name in ("accuracy", "perplexity", "nano_gsm8k", "nano_humaneval", "size_bytes"):
            assert figures[name] == trial["figures"][name], (name, trial["commands"][1])


def test_the_same_command_goes_on_and_another_benchmark_is_refused(outputs: Path) -> None:
    again = run("search.py", *SEARCH, f"outputs={outputs}", "budget.trials=5", "wandb.mode=disabled")
    assert again.returncode == 0, again.stderr
    assert "going on with study small: 5 trials are finished" in again.stderr
    assert "trial 0 (1" not in again.stderr
    before = (outputs / "small" / "study.db").read_bytes()
    other = run("search.py", *SEARCH, f"outputs={outputs}", "budget.trials=6", "benchmark.num_fewshot=1")
    assert other.returncode == 2
    assert "benchmark.num_fewshot: null there, 1 here" in other.stderr
    assert "study=NAME" in other.stderr
    assert (outputs / "small" / "study.db").read_bytes() == before


def test_another_machine_that_does_not_share_the_outputs_of_a_study_is_refused(outputs: Path, tmp_path: Path) -> None:
    shutil.copy(outputs / "small" / "study.db", tmp_path)
    storage = f"storage=sqlite:///{tmp_path / 'study.db'}"
    ended = run("search.py", *SEARCH, storage, f"outputs={tmp_path / 'own'}", "budget.trials=6")
    assert ended.returncode == 2
    assert f"outputs={tmp_path / 'own'}: " in ended.stderr and "study=NAME" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "own").exists()


def test_ctrl_c_ends_it_soon_and_it_goes_on_later(tmp_path: Path) -> None:
    words = ["search.py", *SEARCH, f"outputs={tmp_path}", "wandb.mode=disabled"]
    search = subprocess.Popen(
        [sys.executable, *words, "budget.trials=50"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert search.stderr is not None
    for line in search.stderr:  # until a second trial is under way
        if line.startswith("trial 1 ("):
            break
    sent = time.monotonic()
    os.kill(search.pid, signal.SIGINT)
    rest = search.stderr.read()
    assert search.wait(timeout=30) == 130, rest
    assert time.monotonic() - sent < 30  # 3 s on an idle machine
    assert "the same command goes on with study small" in rest
    assert json.loads((tmp_path / "small" / "front.json").read_text())["points"]
    again = run(*words, "budget.trials=2")
    assert again.returncode == 0, again.stderr
    assert "going on with study small: 1 trials are finished; 1 that were cut off will run again" in again.stderr
