"""The confirmation of the front: jobs like trials, of which some may fail, and none is done twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.search import small_search
from tests.search.test_workers import Small, fine
from winnow.core.errors import Reason, UserError
from winnow.report.table import front_json, front_table
from winnow.search.holdout import FOLDER, confirm, overrides
from winnow.search.job import RIVALS, STOP
from winnow.search.outcome import failure
from winnow.search.trial import run_elsewhere
from winnow.study.opening import open_study
from winnow.study.study import Proposal, Study


def searched(folder: Path) -> Study:
    """A study after its search; the weights of its trials are there."""
    search = Small(folder, lambda strategy, before: fine(strategy))
    search.run()
    for trial in search.study.trials:
        (folder / "trials" / str(trial.number) / "artifact").mkdir(parents=True)
    return search.study


def opened(folder: Path) -> Study:
    return open_study("s", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}})


def scored(proposal: Proposal, worker: int) -> dict[str, Any]:
    return {"figures": {"accuracy": 0.5}, "reason": None, "message": "", "energy": {"wh": 2.0, "co2_g": 1.0}}


def wanted(study: Study) -> set[int]:
    return {*study.front, study.base.number if study.base else -1}


def test_the_front_and_the_base_model_are_confirmed_by_jobs_side_by_side(tmp_path: Path, log_lines: list[str]) -> None:
    study = searched(tmp_path)
    log_lines.clear()
    together = threading.Barrier(2)
    seen: set[tuple[int, int]] = set()

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        if len(seen) < 2:
            seen.add((proposal.number, worker))
            together.wait(60)
        return scored(proposal, worker)

    confirm(study, launch, 2, tmp_path)
    assert set(study.confirmed) == set(opened(tmp_path).confirmed) == wanted(study)
    assert {worker for _, worker in seen} == {0, 1}
    assert len(log_lines) == len(study.confirmed) and all("accuracy 0.500" in line for line in log_lines)


def test_what_it_takes_counts_towards_the_budget_of_the_study(tmp_path: Path) -> None:
    study = searched(tmp_path)
    before = study.energy_wh
    confirm(study, scored, 1, tmp_path)
    assert study.energy_wh == pytest.approx(before + 2 * len(wanted(study)))
    again = opened(tmp_path)
    assert (again.energy_wh, again.co2_g) == pytest.approx((study.energy_wh, study.co2_g))


def test_one_that_fails_is_said_in_a_line_and_its_figures_are_marked_and_it_is_tried_again(
    tmp_path: Path, log_lines: list[str]
) -> None:
    study = searched(tmp_path)
    bad = max(study.front)

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        failed = failure(Reason.OUT_OF_MEMORY, "held 9 GiB, over the limit of 8 GiB")
        return failed if proposal.number == bad else scored(proposal, worker)

    confirm(study, launch, 1, tmp_path)
    assert set(study.confirmed) == wanted(study) - {bad}
    why = "out_of_memory: held 9 GiB, over the limit of 8 GiB"
    assert f"confirmation: trial {bad} is not confirmed: {why}" in log_lines
    assert f"trial {bad}: not confirmed: {why}" in front_table(study.summary())
    points = {point["trial"]: point for point in front_json(study.summary())["points"]}
    assert points[bad]["unconfirmed"] == why and "confirmed" not in points[bad]
    assert set(points) == set(study.front)

    asked: list[int] = []
    later = opened(tmp_path)
    confirm(later, lambda p, w: (asked.append(p.number), scored(p, w))[1], 1, tmp_path)
    assert asked == [bad] and later.unconfirmed == {}


def test_a_launcher_that_fails_leaves_the_front_as_it_is(tmp_path: Path, log_lines: list[str]) -> None:
    study = searched(tmp_path)
    log_lines.clear()

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        raise UserError("hydra/launcher=ray has failed 3 times in a row")

    confirm(study, launch, 1, tmp_path)
    assert study.confirmed == {} and set(study.unconfirmed) == wanted(study)
    assert len(log_lines) == 1 and "hydra/launcher=ray has failed" in log_lines[0]


def test_interrupted_it_cancels_its_jobs_and_keeps_what_was_confirmed(tmp_path: Path) -> None:
    study = searched(tmp_path)
    cancelled = threading.Event()
    asked: list[int] = []

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        asked.append(proposal.number)
        if len(asked) == 1:
            return scored(proposal, worker)
        if len(asked) == 2:
            raise KeyboardInterrupt
        while not (tmp_path / "trials" / str(proposal.number) / FOLDER / STOP).exists():
            threading.Event().wait(0.01)
        cancelled.set()
        return scored(proposal, worker)

    with pytest.raises(KeyboardInterrupt):
        confirm(study, launch, 3, tmp_path)
    assert cancelled.is_set()
    later, again = opened(tmp_path), []
    assert set(later.confirmed) <= {asked[0]}
    confirm(later, lambda p, w: (again.append(p.number), scored(p, w))[1], 1, tmp_path)
    assert set(again) == wanted(later) - set(study.confirmed) and set(later.confirmed) == wanted(later)


def test_without_weights_there_is_nothing_to_confirm_and_it_is_said(tmp_path: Path, log_lines: list[str]) -> None:
    study = searched(tmp_path)
    gone = min(study.front)
    (tmp_path / "trials" / str(gone) / "artifact").rmdir()
    confirm(study, scored, 1, tmp_path)
    assert set(study.confirmed) == wanted(study) - {gone}
    assert any(f"trial {gone} is not confirmed: its weights are gone" in line for line in log_lines)


def test_its_job_runs_below_the_trial_with_the_limits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.build.job_settings import JobSettings, TrialLimits
    from winnow.hardware.device import Hardware
    from winnow.search import child, fork_server

    asked: list[Any] = []

    def call(function: str, arguments: dict[str, Any], limits: child.Limits, *more: Any) -> dict[str, Any]:
        asked.append((arguments["function"], arguments["arguments"]["artifact"], limits.memory_bytes, limits.seconds))
        return {"seconds": 1.0, "energy": {"wh": 1.0}, "failed": None, "result": {"accuracy": 0.5}}

    monkeypatch.setattr(child, "call", call)
    monkeypatch.setattr(fork_server, "start_server", lambda modules: None)
    settings = JobSettings({}, Hardware("cpu"), TrialLimits(2, 8), Path("outputs"), 1, True, [])
    folder = tmp_path / "4" / FOLDER
    folder.mkdir(parents=True)
    outcome = run_elsewhere(settings, [], folder)
    assert outcome["reason"] == "invalid" and "outputs=outputs" in outcome["message"], "the trial does not lie here"
    (tmp_path / "4" / RIVALS).touch()
    assert run_elsewhere(settings, [], folder)["figures"] == {"accuracy": 0.5}
    ((function, artifact, memory_bytes, seconds),) = asked
    assert function == "winnow.search.holdout:score" and artifact == str(tmp_path / "4" / "artifact")
    assert memory_bytes == 8 and seconds == pytest.approx(120, abs=60)
    assert (folder / "outcome.json").exists() and not (tmp_path / "4" / "outcome.json").exists()


def test_its_overrides_are_ones_that_hydra_takes() -> None:
    from tests.test_conf import composed

    flag, subdir = overrides(4)
    assert composed("search", flag).score_holdout is True
    assert subdir == "hydra.sweep.subdir='trials/4/confirmation'"
