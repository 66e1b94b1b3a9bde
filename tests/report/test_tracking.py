"""W&B gets one run a trial and the front, once, without an account, and nothing of the machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from winnow.core.errors import MissingExtra, UserError
from winnow.core.types import Summary
from winnow.report.runs import run_id
from winnow.report.tracking import Tracker

SECRETS = ("wandbkeydummy0123456789", "sk-openaidummy", "argv-secret-dummy")
PROGRAM = """
import pickle, sys, threading
from winnow.report.tracking import Tracker
summary = pickle.load(open(sys.argv[1], "rb"))
print(Tracker("offline", folder=sys.argv[2]).mirror(summary), threading.active_count())
"""


def runs(folder: Path) -> Counter[str]:
    """Offline runs by id; more than one of an id would show twice."""
    return Counter(path.stem.removeprefix("run-") for path in folder.glob("wandb/offline-run-*/run-*.wandb"))


def expected(summary: Summary) -> Counter[str]:
    return Counter([*(run_id(summary, t.number) for t in summary.trials), run_id(summary, "front")])


@pytest.mark.usefixtures("_wandb")
def test_one_run_a_trial_and_no_more_when_repeated(
    summary: Summary, tmp_path: Path, capfd: pytest.CaptureFixture[str], log_lines: list[str]
) -> None:
    threads = threading.active_count()  # other tests' libraries may have left some
    begun = replace(summary, trials=summary.trials[:3])
    assert Tracker("offline", folder=tmp_path).mirror(begun) == 4
    assert runs(tmp_path) == expected(begun)

    tracker = Tracker("offline", folder=tmp_path)
    assert tracker.mirror(summary) == 4  # three new trials, and the front that they change
    assert tracker.mirror(summary) == 0
    assert runs(tmp_path) == expected(summary)

    # forgotten, as after a kill: written again over what is there
    (tmp_path / "mirrored.json").write_text("{")
    assert tracker.mirror(summary) == len(expected(summary))
    assert runs(tmp_path) == expected(summary)

    (table,) = tmp_path.glob("wandb/offline-run-*-front/files/media/table/front*.json")
    rows = json.loads(table.read_text())
    column = rows["columns"].index("is_pareto")
    assert [row[column] for row in rows["data"]] == [True, True, True, False, False, False]
    assert list(tmp_path.glob("wandb/offline-run-*-front/files/media/plotly/*.json"))

    assert log_lines == []
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert threading.active_count() <= threads
    assert multiprocessing.active_children() == []


def test_nothing_of_the_machine_is_recorded(summary: Summary, tmp_path: Path) -> None:
    import pickle

    study, out = tmp_path / "study.pickle", tmp_path / "out"
    study.write_bytes(pickle.dumps(summary))
    env = os.environ | {
        "WANDB_API_KEY": SECRETS[0],
        "OPENAI_API_KEY": SECRETS[1],
        "HOME": str(tmp_path / "home"),
        "WANDB_CACHE_DIR": str(tmp_path / "home/cache"),
        "WANDB_MODE": "online",  # the study's own setting counts
    }
    command = [sys.executable, "-c", PROGRAM, str(study), str(out), f"--password={SECRETS[2]}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["7", "1"], done.stderr
    assert done.stderr == ""
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 7
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in content, f"{secret} is in {path}"
    names = {path.name for path in out.rglob("*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "diff.patch", "output.log"}
    (failed,) = out.glob("wandb/offline-run-*-5/run-*.wandb")
    assert b"longer than 60 s" in failed.read_bytes()


@pytest.mark.usefixtures("_wandb")
def test_online_without_a_key_is_said_once_and_ends_nothing(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = Tracker("online", folder=tmp_path / "out")
    assert tracker.mirror(summary) == 0
    assert tracker.mirror(summary) == 0
    assert len(log_lines) == 1
    assert "wandb login" in log_lines[0]


def test_disabled_does_nothing(summary: Summary, tmp_path: Path) -> None:
    assert Tracker("disabled", folder=tmp_path / "out").mirror(summary) == 0
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="offline, online, disabled"):
        Tracker("of-line")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"winnow\[wandb\]"):
        Tracker("offline")


@pytest.fixture
def _wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own caches under the test's folder, and no settings of the person who runs the tests."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
