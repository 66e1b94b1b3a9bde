"""Two machines on one study: a storage that both reach, an `outputs` that they share, or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.search.small_search import OBJECTIVES
from tests.study.test_storage import RTN, SPACE
from winnow.core.errors import UserError
from winnow.core.types import Strategy, Trial
from winnow.search import outputs
from winnow.study.opening import open_study
from winnow.study.policy import Suggestion
from winnow.study.study import Study


def opened(database: Path) -> Study:
    """The study as each machine sees it: SQLite stands in for a server."""
    url = f"sqlite:///{database}"
    study = open_study("s", url, OBJECTIVES, {"model": {"name": "m"}})
    return Study(study._study, OBJECTIVES, {"model": {"name": "m"}}, url=url)


def tried(study: Study) -> None:
    proposal = study.reserve(Suggestion(Strategy(), "base"), SPACE)
    assert proposal is not None
    study.record(Trial(proposal.number, Strategy(), {"accuracy": 0.5, "size_bytes": 1.0}, {}))


def test_a_machine_with_outputs_of_its_own_is_refused_before_it_writes_anything(tmp_path: Path) -> None:
    database, here, there = tmp_path / "study.db", tmp_path / "here" / "s", tmp_path / "there" / "s"
    first = opened(database)
    outputs.claim(first, here)
    tried(first)
    with pytest.raises(UserError) as refused:
        outputs.claim(opened(database), there)
    for part in (f"outputs={tmp_path / 'there'}", "study=s", str(here), "outputs=FOLDER", "study=NAME"):
        assert part in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and not there.exists()
    outputs.claim(opened(database), here)  # one that shares it
    outputs.check(first, here)


def test_while_the_first_trial_runs_another_machine_is_refused_too(tmp_path: Path) -> None:
    first = opened(tmp_path / "study.db")
    outputs.claim(first, tmp_path / "here" / "s")
    assert first.reserve(Suggestion(RTN, "tpe"), SPACE) is not None
    with pytest.raises(UserError, match="does not hold them"):
        outputs.claim(opened(tmp_path / "study.db"), tmp_path / "there" / "s")


def test_of_two_that_begin_at_once_only_those_that_share_the_folder_go_on(tmp_path: Path) -> None:
    first, second, third = (opened(tmp_path / "study.db") for _ in range(3))
    outputs.claim(first, tmp_path / "here" / "s")
    outputs.claim(second, tmp_path / "here" / "s")
    for one in (first, second):
        outputs.check(one, tmp_path / "here" / "s")
    outputs.claim(third, tmp_path / "there" / "s")  # no trial has begun: the last word counts
    with pytest.raises(UserError, match="outputs="):
        outputs.check(first, tmp_path / "here" / "s")
    outputs.check(third, tmp_path / "there" / "s")


def test_a_study_whose_folder_was_deleted_says_so_and_one_that_moved_goes_on(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "outputs" / "s", tmp_path / "archive" / "s"
    study = opened(tmp_path / "study.db")
    outputs.claim(study, folder)
    tried(study)
    elsewhere.parent.mkdir()
    shutil.move(folder, elsewhere)
    with pytest.raises(UserError, match=r"outputs=.*outputs: .*does not hold them"):
        outputs.claim(opened(tmp_path / "study.db"), folder)
    outputs.claim(opened(tmp_path / "study.db"), elsewhere)
    shutil.rmtree(elsewhere / "trials")
    with pytest.raises(UserError, match=r"outputs=.*archive: .*does not hold them"):
        outputs.check(opened(tmp_path / "study.db"), elsewhere)


def test_a_study_without_trials_begins_wherever_it_is_told_to(tmp_path: Path) -> None:
    outputs.claim(opened(tmp_path / "study.db"), tmp_path / "first" / "s")
    shutil.rmtree(tmp_path / "first")
    outputs.claim(opened(tmp_path / "study.db"), tmp_path / "second" / "s")
    outputs.check(opened(tmp_path / "study.db"), tmp_path / "second" / "s")


def test_a_folder_of_another_study_of_this_name_is_not_taken_for_it(tmp_path: Path) -> None:
    mine, other = opened(tmp_path / "mine.db"), opened(tmp_path / "other.db")
    for study, name in ((mine, "mine"), (other, "other")):
        outputs.claim(study, tmp_path / name / "s")
        tried(study)
    with pytest.raises(UserError, match="belongs to another study"):
        outputs.claim(opened(tmp_path / "mine.db"), tmp_path / "other" / "s")


def test_a_study_of_before_there_were_tokens_goes_on_beside_its_trials_only(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    tried(study)
    with pytest.raises(UserError, match="does not hold them"):
        outputs.claim(study, tmp_path / "here" / "s")
    (tmp_path / "here" / "s" / "trials" / "0").mkdir(parents=True)
    (tmp_path / "here" / "s" / "trials" / "0" / "outcome.json").touch()
    outputs.claim(study, tmp_path / "here" / "s")
    outputs.check(opened(tmp_path / "study.db"), tmp_path / "here" / "s")
