"""Builds a `Search` from a composed `conf/search.yaml` and runs it; checks everything before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from winnow.build.search_settings import SearchSettings, search_settings
from winnow.core.errors import UserError
from winnow.core.files import write_json
from winnow.model.lm import LM
from winnow.model.loading import Loading
from winnow.search import child, decoding, forecaster, fork_server, holdout, outputs, overrides
from winnow.search.launching import Launching, device_shares
from winnow.search.loop import Search
from winnow.search.views import Views
from winnow.search.workers import Launch
from winnow.study import storage
from winnow.study.opening import open_study
from winnow.study.study import Proposal, Study

logger = logging.getLogger(__name__)

MACHINE_FIELDS = ("cpu", "cores", "threads", "gpus")  # left out of the fingerprint where trials run on other machines


def search(config: DictConfig, arguments: Sequence[str], launching: Launching) -> None:
    """Runs the search that `config` and the command line describe, and prints its front.

    Args:
        config: the composed configuration; `method` holds the methods of the space.
        arguments: the overrides as typed by the user.
        launching: runs the trials.
    """
    from winnow.report.table import front_table

    command_line = overrides.parse(arguments)
    settings = search_settings(config, command_line.narrowed)
    if settings.policy is None:
        from winnow.report.dry_run import search_table

        print(search_table(settings))
        return
    here, workers = launching.here, settings.plain.workers
    if here:
        settings.hardware.check()
    devices = device_shares(settings.hardware, workers) if here else [{}] * workers
    fork_server.start_server(settings.preloads)
    if settings.plain.confirm:
        holdout.check(settings)
    if settings.model_moved:
        command_line = command_line.with_model(settings.lm)
    hardware, command_line = decoding.resolve_hardware(settings, here, command_line)
    machine = {k: v for k, v in hardware.fingerprint().items() if here or k not in MACHINE_FIELDS}
    study = _open_study(settings, fingerprint(settings, machine))
    _write_spec(settings)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    launching.prepare(workers)

    folder = settings.folder
    run_trial, run_confirmation = _job_runners(study, folder, command_line, launching, devices)
    run = Search(
        study=study,
        space=settings.space,
        policy=settings.policy,
        forecaster=forecaster.forecasts(settings),
        launch=run_trial,
        budget=settings.budget,
        folder=folder,
        shared=_shared_overrides(settings, command_line.shared),
        views=Views(folder, _tracker(settings)),
        first=settings.first,
        first_trials=settings.plain.first_trials,
        keep=settings.plain.keep,
        workers=workers,
        convergence=settings.convergence,
        confirm=functools.partial(holdout.confirm, study, run_confirmation, workers, folder)
        if settings.plain.confirm
        else None,
    )
    signal.signal(signal.SIGTERM, _interrupt)  # Slurm stops a job this way
    names = ", ".join(o.name for o in settings.objectives)
    logger.info(f"search: {len(settings.space.methods)} methods, objectives {names}; study in {folder}")
    try:
        run.run()
    finally:
        study.close()
    print(front_table(study.summary()))
    print(f"report: {(folder / 'report.html').resolve()}")


def _job_runners(
    study: Study,
    folder: Path,
    command_line: overrides.CommandLine,
    launching: Launching,
    devices: Sequence[Mapping[str, str]],
) -> tuple[Launch, Launch]:
    """Returns the functions that run a trial and the confirmation of a trial, each on the devices of its worker."""

    def run_trial(proposal: Proposal, worker: int) -> dict[str, Any]:
        outputs.check(study, folder)  # the disk may be gone, or another search may have claimed another folder
        return launching.run(proposal.number, command_line.of_trial(proposal.strategy), devices[worker])

    def run_confirmation(proposal: Proposal, worker: int) -> dict[str, Any]:
        lines = [*command_line.of_trial(proposal.strategy), *holdout.overrides(proposal.number)]
        return launching.run(proposal.number, lines, devices[worker])

    return run_trial, run_confirmation


def _open_study(settings: SearchSettings, study_fingerprint: Mapping[str, Any]) -> Study:
    """Opens the study, or creates it, and claims its folder."""
    name, folder = settings.plain.study, settings.folder
    url = settings.storage or storage.sqlite_url(folder / "study.db")
    if (file := storage.sqlite_file(url)) is not None:
        outputs.make_folder(file.parent)
    storage.claim(url, name)
    study = open_study(name, url, settings.objectives, study_fingerprint, settings.constraints)
    outputs.claim(study, folder)
    return study


def fingerprint(settings: SearchSettings, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that must be equal for two trials to be comparable."""
    from winnow.data import corpus
    from winnow.model import manifest

    content: str | None = settings.benchmark.content()  # type: ignore[attr-defined]
    model, benchmark = settings.composed["model"], settings.composed["benchmark"]
    model_fields = {k: v for k, v in model.items() if k in ("name", "dtype", "attention")}
    return {
        "model": {**model_fields, "sha256": settings.lm.sha256()},
        "benchmark": {k: v for k, v in benchmark.items() if not str(k).startswith("_")} | _content_entry(content),
        "hardware": dict(hardware),
        "calibration": dataclasses.asdict(settings.calibration) | _content_entry(corpus.content(settings.calibration)),
        "seed": settings.plain.seed,
        "versions": manifest.versions(),
    }


def _content_entry(sha256: str | None) -> dict[str, str]:
    return {} if sha256 is None else {"content": sha256}


def _shared_overrides(settings: SearchSettings, typed: Sequence[str]) -> list[str]:
    """Returns the overrides that the command lines of a trial need: the chosen config groups and what the user typed."""
    groups = {o.split("=")[0] for o in typed}
    chosen = [
        f"{group}={settings.chosen[group]}" for group in ("model", "benchmark", "hardware") if group not in groups
    ]
    share = settings.plain.confirm
    return [*chosen, *typed, *([f"benchmark.holdout_share={share}"] if share else [])]


def _write_spec(settings: SearchSettings) -> None:
    """Writes `model_spec.json`, the specification of the base model, in a child process because that needs torch."""
    folder, lm = settings.folder, settings.lm
    path = folder / "model_spec.json"
    if not path.is_file():
        try:
            arguments = {"path": lm.path, "loading": dataclasses.asdict(lm.loading)}
            result = child.call("winnow.search.start:model_spec", arguments, child.Limits(), folder / "log.txt")
        except child.Failed as failed:
            raise UserError(f"model.path={lm.path} cannot be read: {failed.message}") from None
        write_json(path, result)


def model_spec(path: str, loading: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child: returns the specification of the model at `path`."""
    from winnow.model.spec import spec

    return spec(LM(path, loading=Loading(**loading)).config()).to_json()


def _tracker(settings: SearchSettings) -> Any:
    if settings.wandb["mode"] == "disabled":
        return None
    from winnow.report.tracking import Tracker

    return Tracker(folder=settings.folder, **settings.wandb)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
