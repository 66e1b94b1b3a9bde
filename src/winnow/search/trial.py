"""One trial: compress in a child process, load the artifact back and evaluate it in another, and say how it went.

The confirmation of a trial is a job of the same kind, in a folder below the trial's.
Two children, because memory is measured: what compressing held must not count for what serving holds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.core.errors import Reason, UserError
from winnow.core.files import whole
from winnow.core.targets import target_of
from winnow.model import manifest
from winnow.search import child
from winnow.search.job import RIVALS, Job

OUTCOME = "outcome.json"
CONFIRMING = "confirming"  # the key that makes a job the confirmation of a trial, in a folder below that one's


def run(
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs the job that `cfg` describes: a trial, or the confirmation of one (`winnow.search.holdout`).

    Its outcome is written to `folder/outcome.json` in one piece, and returned. It holds `overrides` (to know the trial again),
    `figures`, `sources`, `seconds`, `energy`, `reason` and `message`.

    Args:
        environment: variables for the processes that do the work.

    Raises:
        child.Cancelled: the search is over, or has given this job up; there is no outcome.
    """
    number = _trial_folder(cfg, folder).name
    say = (lambda line: None) if cfg.get(CONFIRMING) else log  # the search itself says how a confirmation went
    job = Job(cfg, number, folder, say, dict(environment or {}))
    if job.cancelled():  # it has waited in a cluster's queue, say
        raise child.Cancelled(f"{folder} is no longer wanted")
    child.start_server(preloads(cfg))
    outcome: dict[str, Any] = {"figures": {}, "sources": {}, "reason": None, "message": "", "stages": []}
    try:
        for part in _confirmed(job) if cfg.get(CONFIRMING) else _tried(job):
            outcome |= part
    except child.Failed as failed:
        outcome |= {"reason": failed.reason.value, "message": failed.message, "figures": {}, "sources": {}}
    except child.Cancelled:
        job.leave_spent()
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
    """The job that a launcher has brought to some machine, which has to see the folder of the study there."""
    if not (_trial_folder(cfg, folder) / RIVALS).is_file():
        return failure(
            Reason.INVALID,
            f"outputs={cfg.outputs}: {platform.node()}, where a job of this search runs, does not find the study's files in "
            f"{folder.parent}; give outputs=FOLDER on a disk that all machines share",
        )
    return run(cfg, overrides, folder, log, environment)


def _trial_folder(cfg: DictConfig, folder: Path) -> Path:
    """That of the trial which the job of a folder is, or confirms."""
    return folder.parent if cfg.get(CONFIRMING) else folder


def _tried(job: Job) -> Iterator[dict[str, Any]]:
    """Compresses and evaluates; what each adds to the outcome."""
    artifact, metrics = job.folder / "artifact", job.folder / "metrics"
    for leftover in (artifact, metrics):  # where a cluster starts a job once more
        shutil.rmtree(leftover, ignore_errors=True)
    arguments = {"artifact": str(artifact)}
    job.step("compress", "winnow.search.trial:compress", arguments | {"output": str(artifact)})
    shutil.copyfile(artifact / manifest.NAME, job.folder / manifest.NAME)  # stays when the weights go
    yield {"stages": _stages(manifest.read(artifact))}
    result = job.step("evaluate", "winnow.search.trial:evaluate", arguments | {"output": str(metrics)})
    for path in list(metrics.iterdir()):
        path.replace(job.folder / path.name)
    metrics.rmdir()
    job.seconds |= result["parts"]
    yield {"figures": result["figures"], "sources": result["sources"], **result["stopped"]}


def _confirmed(job: Job) -> Iterator[dict[str, Any]]:
    """Scores the artifact of the trial in whose folder this one lies."""
    arguments = {"artifact": str(job.folder.parent / "artifact"), "output": str(job.folder / "metrics")}
    yield {"figures": job.step("confirm", "winnow.search.holdout:score", arguments)}


def preloads(cfg: DictConfig) -> list[str]:
    """Modules that the stages of `cfg.method` and the benchmark want imported once, in the fork server."""
    users = [target_of(node["_target_"]) for node in [*build.methods(cfg).values(), cfg.benchmark]]
    return sorted({module for user in users for module in user.preload})


def compress(settings: dict[str, Any], output: str, artifact: str, log: Callable[[str], None]) -> None:
    """In the child: `compress.py`'s work."""
    from winnow import commands

    # W&B sees the whole study (`winnow.report.tracking`), not the curves of each trial
    quiet = {**settings["wandb"], "mode": "disabled"}
    cfg = OmegaConf.create({**settings, "output": output, "wandb": quiet})
    _check_base(cfg, Path(output).parent)
    commands.compress(cfg, log)


def _check_base(cfg: DictConfig, folder: Path) -> None:
    """Raises UserError if the base model is another one than that of the study."""
    path = folder / RIVALS
    known = json.loads(path.read_text(encoding="utf-8")).get("model") if path.is_file() else None
    lm = build.model(cfg)
    if known is not None and lm.sha256() != known:
        raise UserError(
            f"model.path={lm.path}: its files have changed since the study began, and its trials could not be compared; "
            f"put the model back, or give the changed one a study of its own: study=NAME"
        )


def evaluate(settings: dict[str, Any], output: str, artifact: str, log: Callable[[str], None]) -> dict[str, Any]:
    """In the child: `evaluate.py`'s work on the artifact, which ends early where the trial's gates say so."""
    from winnow import commands
    from winnow.search.early_stopping import EarlyStopping

    model = {**settings["model"], "_target_": "winnow.model.pretrained.pretrained", "path": artifact}
    gates = EarlyStopping(OmegaConf.create(settings), Path(output).parent, log)
    metrics = commands.evaluate(OmegaConf.create({**settings, "model": model, "output": output}), log, gates)
    return {
        "figures": metrics["figures"],
        "sources": metrics["sources"],
        "stopped": metrics.get("stopped", {}),
        "parts": metrics["seconds"],
    }


def _stages(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each stage of an artifact took, in seconds, and whether an earlier trial had paid for it."""
    return [{"method": r["method"], "seconds": r["seconds"], "reused": r.get("reused", False)} for r in held["stages"]]


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """The outcome of a trial that reached its end, if it did."""
    try:
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def failure(reason: Reason, message: str) -> dict[str, Any]:
    """The outcome of a trial that did not even start."""
    return {"figures": {}, "sources": {}, "reason": reason.value, "message": message, "seconds": {}}


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Puts an outcome on the disk, whole or not at all: from here on a kill cannot lose the trial."""
    with whole(folder / OUTCOME) as scratch, scratch.open("w", encoding="utf-8") as file:
        json.dump(outcome, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
