"""Confirms the finished front: scores it again on held-out items, and finds the trials whose place was luck.

Choosing the best of many by a noisy score also chooses noise. Held-out items show how much: a strategy that owed its place to its
accuracy loses it if another one that is no worse in anything else is at least as accurate on them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import Any

from winnow.build.job_settings import SCORE_HOLDOUT, confirmation, holdout_benchmark
from winnow.build.search_settings import SearchSettings
from winnow.core import grammar
from winnow.core.errors import UserError
from winnow.search import child
from winnow.search.folders import Folders
from winnow.search.workers import Launch, Workers
from winnow.study.policy import Suggestion
from winnow.study.study import Proposal, Study

logger = logging.getLogger(__name__)

FOLDER = "confirmation"  # subfolder of a trial's folder


def overrides(number: int) -> list[str]:
    """Returns the overrides that turn the job of a trial into its confirmation."""
    return [f"+{SCORE_HOLDOUT}=true", f"hydra.sweep.subdir={grammar.quoted(f'trials/{number}/{FOLDER}')}"]


def confirm(study: Study, launch: Launch, workers: int, folder: Path) -> None:
    """Scores the front and the base model on the held-out items, except trials that are already confirmed.

    A trial whose confirmation fails is reported as unconfirmed and keeps its place; the next start of the search tries it again.

    Args:
        launch: runs the confirmation of a trial as a job.
        folder: the folder of the study.
    """
    folders, job_folders = Folders(folder / "trials"), Folders(folder / "trials", FOLDER)
    trials_by_number = {t.number: t for t in ([study.base] if study.base else []) + list(study.on_front)}
    pending = [trial for number, trial in trials_by_number.items() if number not in study.confirmed]

    def leave_out(number: int, why: str) -> None:
        study.unconfirmed[number] = why
        logger.info(f"confirmation: trial {number} is not confirmed: {why}")

    done, count = 0, len(pending)
    pool = Workers(launch, workers)
    try:
        while pending or not pool.idle:
            while pending and pool.free:
                trial = pending.pop(0)
                if (folders.of(trial.number) / "artifact").is_dir():
                    study.record_energy(job_folders.spent(trial.number))
                    job_folders.clear(trial.number)  # files of an earlier attempt
                    pool.start(Proposal(trial.number, Suggestion(trial.strategy, FOLDER)))
                else:
                    leave_out(trial.number, "its weights are gone (keep=front keeps them)")
            if pool.idle:
                continue
            proposal, outcome, _ = pool.wait()
            done += 1
            study.record_energy(outcome.get("energy", {}))
            if outcome["reason"]:
                leave_out(proposal.number, f"{outcome['reason']}: {outcome['message']}")
                continue
            study.confirm(proposal.number, outcome["figures"])
            accuracy = outcome["figures"]["accuracy"]
            logger.info(
                f"confirmation {done} of {count}: trial {proposal.number}, accuracy {accuracy:.3f} on fresh items"
            )
    except UserError as error:  # the launcher failed; the search itself is complete
        for number in trials_by_number.keys() - study.confirmed.keys() - study.unconfirmed.keys():
            study.unconfirmed[number] = str(error)
        logger.info(f"confirmation: the rest of the front is not confirmed: {error}")
    finally:
        pool.stop(job_folders.cancel)


def check(settings: SearchSettings) -> None:
    """Raises UserError if a benchmark has no items to confirm on; a child process reads them, because that needs lm-eval."""
    # the first trial meets other faults
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(child.Failed):
        arguments = {"composed": settings.composed}
        function, log = "winnow.search.holdout:find_empty", Path(scratch) / "log.txt"
        refusal = child.call(function, arguments, child.Limits(), log, prefix=None)["refusal"]
        if refusal:
            raise UserError(refusal)


def find_empty(composed: dict[str, Any]) -> dict[str, str]:
    """Runs in the child: returns why a confirmation would have no items, as `refusal`; "" if it has some."""
    from winnow.benchmark.harness import EmptyHoldout, Harness

    benchmark = holdout_benchmark(composed)
    assert isinstance(benchmark, Harness)
    try:
        benchmark.load_items()
    except EmptyHoldout as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


def score(composed: dict[str, Any], artifact: str, output: str) -> dict[str, float]:
    """Runs in the child: returns the scores of an artifact on the held-out items."""
    from winnow.core.files import atomic_folder
    from winnow.hardware.lock import shared_device
    from winnow.runtime import serving

    settings = confirmation(composed, artifact, output)
    hardware, lm = settings.run.hardware, settings.lm
    hardware.check()
    with (
        atomic_folder(settings.output) as folder,
        shared_device(hardware.device),
        serving(lm, hardware) as served,
    ):
        return dict(settings.benchmark(lm, settings.run.start(folder), served=served))
