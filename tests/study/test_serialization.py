"""A study that an earlier version stored goes on under the present names of its settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.search import small_search
from winnow.core.errors import UserError
from winnow.core.types import Strategy, Summary, Trial
from winnow.report.runs import run_id
from winnow.study.opening import open_study
from winnow.study.policy import Suggestion
from winnow.study.space import read_space
from winnow.study.study import Study

SPACE = read_space(small_search.METHODS, {})
EARLIER = {"name": "nano", "limit": 100, "held_back": 0.2, "confirming": False}
PRESENT = {"name": "nano", "limit": 100, "holdout_share": 0.2, "score_holdout": False}


def fingerprint(benchmark: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"name": "m"}, "benchmark": benchmark, "seed": 0}


def opened(folder: Path, benchmark: dict[str, Any] = PRESENT) -> Study:
    return open_study("s", small_search.address(folder), small_search.OBJECTIVES, fingerprint(benchmark))


def tried(study: Study, strategy: Strategy, evaluate: str) -> None:
    """A trial of the study, from its proposal to its record."""
    proposal = study.reserve(Suggestion(strategy, "first"), SPACE)
    assert proposal is not None
    trial = Trial(proposal.number, strategy, {"accuracy": 0.5, "size_bytes": 1.0}, {})
    assert study.record(dataclasses.replace(trial, commands=("python compress.py", evaluate)))


def stored_by_an_earlier_version(folder: Path) -> Summary:
    """A study with one trial, whose settings have their earlier names; as that version summed it up."""
    study = opened(folder)
    tried(study, Strategy(), "python evaluate.py model=local benchmark=nano benchmark.held_back=0.2 seed=0")
    study._study.set_user_attr("fingerprint", fingerprint(EARLIER))
    study.close()
    return dataclasses.replace(study.summary(), fingerprint=fingerprint(EARLIER))


def test_a_study_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    earlier = stored_by_an_earlier_version(tmp_path)
    study = opened(tmp_path)
    tried(study, Strategy(("nf4",)), "python evaluate.py")
    study.close()
    again = opened(tmp_path)
    assert [trial.number for trial in again.trials] == [0, 1]
    evaluate = "python evaluate.py model=local benchmark=nano benchmark.holdout_share=0.2 seed=0"
    assert again.trials[0].commands[1] == evaluate
    assert run_id(again.summary(), 0) == run_id(earlier, 0), "W&B would get each trial a second time"


def test_a_study_of_an_earlier_version_with_another_share_is_refused(tmp_path: Path) -> None:
    stored_by_an_earlier_version(tmp_path)
    with pytest.raises(UserError, match=r"benchmark\.holdout_share: 0\.2 there, 0\.3 here.*study=NAME"):
        opened(tmp_path, PRESENT | {"holdout_share": 0.3})
