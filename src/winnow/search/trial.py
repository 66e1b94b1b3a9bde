"""Runs one trial: compresses in a child process, evaluates the artifact in another one and writes the outcome.

The confirmation of a trial is a job of the same kind, in a folder below the trial's.
Two children are used because memory is measured: the memory of compression must not count as memory of serving.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.core.errors import Reason, UserError
from winnow.core.targets import target_of
from winnow.model import manifest
from winnow.search import child, fork_server
from winnow.search.job import RIVALS, Job
from winnow.search.outcome import failure, write_outcome

SCORE_HOLDOUT = "score_holdout"  # config key that makes a job the confirmation of a trial


def run(
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs the job that `cfg` describes: a trial, or the confirmation of one (`winnow.search.holdout`).

    Writes the outcome to `folder/outcome.json` in one piece and returns it. The outcome holds `overrides` (to recognise the
    trial), `figures`, `sources`, `seconds`, `energy`, `reason` and `message`.

    Args:
        environment: environment variables for the child processes.

    Raises:
        child.Cancelled: the search is over or has cancelled this job; there is no outcome.
    """
    number = _trial_folder(cfg, folder).name
    say = (lambda line: None) if cfg.get(SCORE_HOLDOUT) else log  # the search itself reports a confirmation
    job = Job(cfg, number, folder, say, dict(environment or {}))
    if job.cancelled():  # e.g. while it waited in a cluster's queue
        raise child.Cancelled(f"{folder} is no longer wanted")
    fork_server.start_server(preloads(cfg))
    outcome: dict[str, Any] = {"figures": {}, "sources": {}, "reason": None, "message": "", "stages": []}
    try:
        for part in _run_confirmation(job) if cfg.get(SCORE_HOLDOUT) else _run_steps(job):
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
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a job on the machine that a launcher chose; the outcome is a failure if that machine does not see the study's folder."""
    if not (_trial_folder(cfg, folder) / RIVALS).is_file():
        return failure(
            Reason.INVALID,
            f"outputs={cfg.outputs}: {platform.node()}, where a job of this search runs, does not find the study's files in "
            f"{folder.parent}; give outputs=FOLDER on a disk that all machines share",
        )
    return run(cfg, overrides, folder, log, environment)


def _trial_folder(cfg: DictConfig, folder: Path) -> Path:
    """Returns the folder of the trial that a job is or confirms."""
    return folder.parent if cfg.get(SCORE_HOLDOUT) else folder


def _run_steps(job: Job) -> Iterator[dict[str, Any]]:
    """Compresses and evaluates; yields what each step adds to the outcome."""
    artifact, metrics = job.folder / "artifact", job.folder / "metrics"
    for leftover in (artifact, metrics):  # from an earlier start of this job by the cluster
        shutil.rmtree(leftover, ignore_errors=True)
    arguments = {"artifact": str(artifact)}
    job.step("compress", "winnow.search.trial:compress", arguments | {"output": str(artifact)})
    shutil.copyfile(artifact / manifest.NAME, job.folder / manifest.NAME)  # stays when the weights are removed
    yield {"stages": _stage_records(manifest.read(artifact))}
    result = job.step("evaluate", "winnow.search.trial:evaluate", arguments | {"output": str(metrics)})
    for path in list(metrics.iterdir()):
        path.replace(job.folder / path.name)
    metrics.rmdir()
    job.seconds |= result["parts"]
    yield {"figures": result["figures"], "sources": result["sources"], **result["stopped"]}


def _run_confirmation(job: Job) -> Iterator[dict[str, Any]]:
    """Scores the artifact of the trial that contains this folder; yields what that adds to the outcome."""
    arguments = {"artifact": str(job.folder.parent / "artifact"), "output": str(job.folder / "metrics")}
    yield {"figures": job.step("confirm", "winnow.search.holdout:score", arguments)}


def model_settings(settings: Mapping[str, Any], artifact: str) -> dict[str, Any]:
    """Returns the model settings of a job with the artifact in place of the base model."""
    return {**settings["model"], "_target_": "winnow.model.pretrained.pretrained", "path": artifact}


def preloads(cfg: DictConfig) -> list[str]:
    """Returns the modules that the stages of `cfg.method` and the benchmark ask the fork server to import once."""
    users = [target_of(node["_target_"]) for node in [*build.methods(cfg).values(), cfg.benchmark]]
    return sorted({module for user in users for module in user.preload})


def compress(settings: dict[str, Any], output: str, artifact: str, log: Callable[[str], None]) -> None:
    """Runs in the child: does the work of `compress.py`."""
    from winnow import commands

    # W&B gets the whole study (`winnow.report.tracking`), not the curves of each trial
    quiet = {**settings["wandb"], "mode": "disabled"}
    cfg = OmegaConf.create({**settings, "output": output, "wandb": quiet})
    _check_base_unchanged(cfg, Path(output).parent)
    commands.compress(cfg, log)


def _check_base_unchanged(cfg: DictConfig, folder: Path) -> None:
    """Raises UserError if the base model differs from that of the study."""
    path = folder / RIVALS
    expected_sha256 = json.loads(path.read_text(encoding="utf-8")).get("model") if path.is_file() else None
    lm = build.model(cfg)
    if expected_sha256 is not None and lm.sha256() != expected_sha256:
        raise UserError(
            f"model.path={lm.path}: its files have changed since the study began, and its trials could not be compared; "
            f"put the model back, or give the changed one a study of its own: study=NAME"
        )


def evaluate(settings: dict[str, Any], output: str, artifact: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Runs in the child: does the work of `evaluate.py` on the artifact, with early stopping."""
    from winnow import commands
    from winnow.search.early_stopping import EarlyStopping

    model = model_settings(settings, artifact)
    early_stopping = EarlyStopping(OmegaConf.create(settings), Path(output).parent, log)
    metrics = commands.evaluate(OmegaConf.create({**settings, "model": model, "output": output}), log, early_stopping)
    return {
        "figures": metrics["figures"],
        "sources": metrics["sources"],
        "stopped": metrics.get("stopped", {}),
        "parts": metrics["seconds"],
    }


def _stage_records(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns for each stage of an artifact its method, its seconds and whether an earlier trial had already run it."""
    return [
        {"method": r["method"], "seconds": r["seconds"], "reused": r.get("reused", False)} for r in record["stages"]
    ]
