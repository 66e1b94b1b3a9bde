"""Jobs: what a step takes is counted towards the budget, whatever end it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.logged import logged
from winnow.build.job_settings import JobSettings, TrialLimits
from winnow.core.errors import Reason
from winnow.hardware.device import Hardware
from winnow.search import child, trial
from winnow.search.job import STOP, Job, read_spent
from winnow.search.outcome import read_outcome

STEP = "tests.search.workers:burn"


def settings(minutes: float | None = None, workers: int = 1, is_confirmation: bool = False) -> JobSettings:
    hardware = Hardware("cpu", carbon_g_per_kwh=100.0)
    return JobSettings({}, hardware, TrialLimits(minutes), Path(), workers, is_confirmation, [])


def job(folder: Path, minutes: float | None = None, **changes: Any) -> Job:
    pytest.importorskip("codecarbon")
    return Job(settings(minutes, **changes), "7", folder, {})


@pytest.mark.parametrize(
    ("changes", "lines"),
    [({}, ["burnt"]), ({"workers": 2}, ["[7] burnt"]), ({"workers": 2, "is_confirmation": True}, [])],
)
def test_its_lines_name_it_among_several_and_those_of_a_confirmation_are_hidden(
    changes: dict[str, Any], lines: list[str], tmp_path: Path, log_lines: list[str]
) -> None:
    job(tmp_path, **changes).step("compress", STEP, {"end": "well"})
    assert log_lines == lines


def test_a_step_that_fails_counts_what_it_used_as_one_that_does_not(tmp_path: Path) -> None:
    well, badly = job(tmp_path), job(tmp_path)
    assert well.step("compress", STEP, {"end": "well"}) == {"figures": 1}
    with pytest.raises(child.Failed, match="ValueError: half way") as failed:
        badly.step("compress", STEP, {"end": "fails"})
    assert failed.value.reason is Reason.ERROR
    for one in (well, badly):
        assert one.energy["wh"] > 0 and "unmetered_wh" not in one.energy
        assert one.energy["co2_g"] == pytest.approx(one.energy["wh"] / 10)
        assert one.seconds["compress"] > 0


@pytest.mark.parametrize(
    ("end", "minutes", "reason"), [("hangs", 1 / 60, Reason.TIMEOUT), ("killed", None, Reason.CRASHED)]
)
def test_a_step_that_is_killed_counts_by_its_times(
    end: str, minutes: float | None, reason: Reason, tmp_path: Path
) -> None:
    killed = job(tmp_path, minutes)
    with pytest.raises(child.Failed) as failed:
        killed.step("evaluate", STEP, {"end": end})
    assert failed.value.reason is reason
    assert killed.energy["wh"] == killed.energy["unmetered_wh"] > 0
    assert killed.energy["co2_g"] == pytest.approx(killed.energy["wh"] / 10)


def test_a_job_that_is_cancelled_leaves_its_energy_for_the_search_that_goes_on(tmp_path: Path) -> None:
    cancelled = job(tmp_path)
    with pytest.raises(child.Cancelled), logged(lambda line: (tmp_path / STOP).touch()):
        cancelled.step("compress", STEP, {"end": "hangs"})
    cancelled.write_spent()
    assert read_spent(tmp_path)["wh"] > 0


def test_a_trial_that_fails_has_energy_in_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(job: Job) -> Any:
        yield {"figures": job.step("compress", STEP, {"end": "fails"})}

    pytest.importorskip("codecarbon")
    monkeypatch.setattr(trial, "_run_steps", parts)
    outcome = trial.run(settings(), [], tmp_path)
    assert outcome["reason"] == "error" and outcome["energy"]["wh"] > 0
    assert read_outcome(tmp_path) == outcome
