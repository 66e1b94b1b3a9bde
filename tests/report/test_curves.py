"""A training's curves reach W&B, from one process, without an account; and W&B ends no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.test_conf import composed
from winnow import commands
from winnow.build.command_settings import compression
from winnow.core.errors import UserError
from winnow.report import curves as module
from winnow.report.curves import Curves

ENVIRONMENT = ("WANDB_API_KEY", "WANDB_MODE")


@pytest.fixture(autouse=True)
def _wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


def curves(folder: Path, mode: str, **more: Any) -> Curves:
    return Curves(mode, "winnow", None, folder, "tiny-lora-1234", {"method": {"lora": {"rank": 8}}}, **more)


def test_points_are_written_offline_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], log_lines: list[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openaidummy")
    monkeypatch.setattr("sys.argv", ["train.py", "argv-secret-dummy"])
    with curves(tmp_path / "out", "offline") as opened:
        for step in range(1, 4):
            opened.log(step, {"loss": 1 / step})
        opened.log(3, {"held_out_loss": 0.123})
    (run,) = tmp_path.glob("out/wandb/offline-run-*/run-*.wandb")
    content = run.read_bytes()
    assert content.count(b"held_out_loss") and b"tiny-lora-1234" in content and b"rank" in content
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"sk-openaidummy" not in path.read_bytes() and b"argv-secret" not in path.read_bytes(), path
    printed = capfd.readouterr()
    assert (log_lines, printed.out + printed.err) == ([], "")


def test_without_a_point_or_disabled_nothing_is_written(tmp_path: Path) -> None:
    with curves(tmp_path / "out", "offline"):
        pass
    with curves(tmp_path / "out", "disabled") as opened:
        opened.log(1, {"loss": 1.0})
    assert not (tmp_path / "out").exists()


def test_a_failure_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with curves(tmp_path / "out", "online") as opened:
        opened.log(1, {"loss": 1.0})
        opened.log(2, {"loss": 0.5})
    assert len(log_lines) == 1 and "wandb login" in log_lines[0] and "the training goes on" in log_lines[0]
    with pytest.raises(UserError, match="offline, online, disabled"):
        curves(tmp_path, "of-line")


def test_an_online_run_goes_on_after_a_stop(tmp_path: Path) -> None:
    """Its id lies with the checkpoints."""
    ids = [curves(tmp_path, "online", memory=tmp_path / "scratch" / "wandb-id")._id() for _ in range(2)]
    assert ids[0] == ids[1]
    other = curves(tmp_path, "online", memory=tmp_path / "other" / "wandb-id")._id()
    assert other != ids[0]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "disabled"),
        ({"WANDB_API_KEY": "x"}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "disabled"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compress"])
def test_the_mode_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, command: str, environment: dict[str, str], mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert composed(command).wandb.mode == mode
    assert composed(command, "wandb.mode=offline").wandb.mode == "offline"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert composed(command).wandb.mode == "disabled"


def test_where_results_go_does_not_depend_on_wandb(tiny: Path) -> None:
    base = ["model=local", f"model.path={tiny}"]
    some = [[], ["wandb.mode=offline"], ["wandb.project=mine"], ["seed=1"]]
    names = [compression(composed("train", *base, *more), "train").output.name for more in some]
    assert names[0] == names[1] == names[2] != names[3]


def test_a_trial_of_a_search_has_no_curves_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from winnow.search import trial

    seen: list[Any] = []
    monkeypatch.setattr("winnow.commands.compress", lambda settings: seen.append(settings))
    settings = OmegaConf.to_container(composed("search", "method=[rtn]"), resolve=True)
    trial.compress(settings, str(tmp_path))  # type: ignore[arg-type]
    assert seen[0].curves["mode"] == "disabled" and seen[0].curves["project"] == "winnow"


def test_config_shown_is_plain_and_small(tiny: Path, tmp_path: Path) -> None:
    cfg = composed(
        "train", "model=local", f"model.path={tiny}", "method.lora.rank=8", f"output={tmp_path / 'x-lora-1'}"
    )
    made = commands.curves_of(compression(cfg, "train"))
    assert isinstance(made, module.Curves) and made.name == "x-lora-1"
    assert set(made.config) == {"model", "method", "calibration", "seed"}
    assert made.config["method"]["lora"]["rank"] == 8
