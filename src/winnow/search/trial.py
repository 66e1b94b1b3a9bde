"""Runs one trial: compresses in a child process, evaluates the artifact in another one and writes the outcome.

The confirmation of a trial is a job of the same kind, in a folder below the trial's.
Two children are used because memory is measured: the memory of compression must not count as memory of serving.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.build.command_settings import METRICS
from winnow.build.job_settings import JobSettings
from winnow.core.errors import Reason, UserError
from winnow.model import manifest
from winnow.model.lm import LM
from winnow.search import child, fork_server
from winnow.search.job import RIVALS, Job
from winnow.search.outcome import failure, write_outcome


def run(
    settings: JobSettings,
    overrides: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a job: a trial, or the confirmation of one (`winnow.search.holdout`).

    Writes the outcome to `folder/outcome.json` in one piece and returns it. The outcome holds `overrides` (to recognise the
    trial), `figures`, `sources`, `seconds`, `energy`, `reason` and `message`.

    Args:
        environment: environment variables for the child processes.

    Raises:
        child.Cancelled: the search is over or has cancelled this job; there is no outcome.
    """
    number = _trial_folder(settings, folder).name
    job = Job(settings, number, folder, dict(environment or {}))
    if job.cancelled():  # e.g. while it waited in a cluster's queue
        raise child.Cancelled(f"{folder} is no longer wanted")
    fork_server.start_server(settings.preloads)
    outcome: dict[str, Any] = {"figures": {}, "sources": {}, "reason": None, "message": "", "stages": []}
    try:
        for part in _run_confirmation(job) if settings.is_confirmation else _run_steps(job):
            outcome |= part
    except child.Failed as failed:
        outcome |= {"reason": failed.reason.value, "message": failed.message, "figures": {}, "sources": {}}
    except child.Cancelled:
        job.write_spent()
        raise
    outcome |= {"seconds": job.all_seconds(), "energy": job.energy, "overrides": list(overrides)}
    write_outcome(folder, outcome)
    return outcome


def run_elsewhere(
    settings: JobSettings,
    overrides: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a job on the machine that a launcher chose; the outcome is a failure if that machine does not see the study's folder."""
    if not (_trial_folder(settings, folder) / RIVALS).is_file():
        return failure(
            Reason.INVALID,
            f"outputs={settings.outputs}: {platform.node()}, where a job of this search runs, does not find the study's files in "
            f"{folder.parent}; give outputs=FOLDER on a disk that all machines share",
        )
    return run(settings, overrides, folder, environment)


def _trial_folder(settings: JobSettings, folder: Path) -> Path:
    """Returns the folder of the trial that a job is or confirms."""
    return folder.parent if settings.is_confirmation else folder


def _run_steps(job: Job) -> Iterator[dict[str, Any]]:
    """Compresses and evaluates; yields what each step adds to the outcome."""
    artifact, metrics = job.folder / "artifact", job.folder / "metrics"
    for leftover in (artifact, metrics):  # from an earlier start of this job by the cluster
        shutil.rmtree(leftover, ignore_errors=True)
    job.step("compress", "winnow.search.trial:compress", {"output": str(artifact)})
    shutil.copyfile(artifact / manifest.NAME, job.folder / manifest.NAME)  # stays when the weights are removed
    yield {"stages": _stage_records(manifest.read(artifact))}
    arguments = {"artifact": str(artifact), "output": str(metrics)}
    job.step("evaluate", "winnow.search.trial:evaluate", arguments)
    measured = json.loads((metrics / METRICS).read_text(encoding="utf-8"))
    for path in list(metrics.iterdir()):
        path.replace(job.folder / path.name)
    metrics.rmdir()
    job.seconds |= measured["seconds"]
    yield {"figures": measured["figures"], "sources": measured["sources"], **measured.get("stopped", {})}


def _run_confirmation(job: Job) -> Iterator[dict[str, Any]]:
    """Scores the artifact of the trial that contains this folder; yields what that adds to the outcome."""
    arguments = {"artifact": str(job.folder.parent / "artifact"), "output": str(job.folder / "metrics")}
    yield {"figures": job.step("confirm", "winnow.search.holdout:score", arguments)}


def compress(composed: dict[str, Any], output: str) -> None:
    """Runs in the child: does the work of `compress.py`."""
    from winnow import commands
    from winnow.build.job_settings import trial_compression

    settings = trial_compression(composed, output)
    _check_base_unchanged(settings.lm, Path(output).parent)
    commands.compress(settings)


def _check_base_unchanged(lm: LM, folder: Path) -> None:
    """Raises UserError if the base model differs from that of the study."""
    path = folder / RIVALS
    expected_sha256 = json.loads(path.read_text(encoding="utf-8")).get("model") if path.is_file() else None
    if expected_sha256 is not None and lm.sha256() != expected_sha256:
        raise UserError(
            f"model.path={lm.path}: its files have changed since the study began, and its trials could not be compared; "
            f"put the model back, or give the changed one a study of its own: study=NAME"
        )


def evaluate(composed: dict[str, Any], artifact: str, output: str) -> None:
    """Runs in the child: does the work of `evaluate.py` on the artifact, with early stopping."""
    from winnow import commands
    from winnow.build.job_settings import trial_evaluation
    from winnow.search.early_stopping import EarlyStopping

    settings = trial_evaluation(composed, artifact, output)
    early_stopping = EarlyStopping(settings, Path(output).parent)
    commands.evaluate(settings.evaluation, early_stopping)


def _stage_records(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns for each stage of an artifact its method, its seconds and whether an earlier trial had already run it."""
    return [
        {"method": r["method"], "seconds": r["seconds"], "reused": r.get("reused", False)} for r in record["stages"]
    ]
