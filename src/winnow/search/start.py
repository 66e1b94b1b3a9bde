"""Builds a `Search` from a composed `conf/search.yaml` and runs it; checks everything before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.agent.recipe import read_recipe
from winnow.core.cli import say
from winnow.core.errors import UserError, check_seed
from winnow.core.files import write_json
from winnow.core.scalars import check_scalars
from winnow.core.types import Slot, Strategy
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.model.loading import Loading
from winnow.search import child, decoding, forecaster, fork_server, holdout, outputs, overrides, trial
from winnow.search.early_stopping import Racing
from winnow.search.launching import Launching, device_shares
from winnow.search.loop import KEEP, Search
from winnow.search.views import Views
from winnow.search.workers import Launch
from winnow.study import storage
from winnow.study.budget import Budget, Convergence
from winnow.study.objectives import constraints, objectives
from winnow.study.opening import open_study
from winnow.study.policy import Policy
from winnow.study.space import Space, read_space
from winnow.study.study import Proposal, Study

MACHINE_FIELDS = ("cpu", "cores", "threads", "gpus")  # left out of the fingerprint where trials run on other machines
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The plain settings of a search: those from which no object is built."""

    workers: int
    first_trials: int
    convergence: int | None
    confirm: float
    stage_cache_gb: float
    keep: str
    study: str
    seed: int
    interactive: bool
    dry_run: bool

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise UserError(f"keep={self.keep} is not known; it is one of {', '.join(KEEP)}")
        if self.workers < 1:
            raise UserError(f"workers={self.workers} leaves nobody to run a trial; give at least 1")
        for name in ("first_trials", "stage_cache_gb"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is negative; give 0 to do without")


@dataclass(frozen=True)
class Limits:
    """Limits of a trial; None is no limit."""

    minutes: float | None
    memory_bytes: float | None


def search(config: DictConfig, arguments: Sequence[str], launching: Launching) -> None:
    """Runs the search that `config` and the command line describe, and prints its front.

    Args:
        config: the composed configuration; `method` holds the methods of the space.
        arguments: the overrides as typed by the user.
        launching: runs the trials.
    """
    from winnow.report.table import front_table

    command_line = overrides.parse(arguments)
    space = read_space({name: _plain(node) for name, node in build.methods(config).items()}, command_line.narrowed)
    _check_settings(config)
    _check_fixed(config, space)
    first = first_strategies(space, config) if config.recipe is None else []
    budget = _build(Budget, config.budget, "budget")
    convergence = Convergence(config.convergence if config.recipe is None else None)
    lm, hardware, benchmark = build.model(config, not config.dry_run), build.hardware(config), build.benchmark(config)
    config, command_line = _pin_model(config, command_line, lm)
    scores = benchmark.scores()
    holdout.check(config.confirm, benchmark)
    study_objectives = objectives(list(config.objectives), scores)
    limits = constraints(_plain(config.constraints), scores)
    if config.dry_run:
        from winnow.report.dry_run import search_table

        print(search_table(config, space, budget))
        return
    policy = _policy(config, space)
    if launching.here:
        hardware.check()
    devices = device_shares(hardware, config.workers) if launching.here else [{}] * config.workers
    fork_server.start_server(trial.preloads(config))
    hardware, command_line = decoding.resolve_hardware(config, hardware, launching.here, command_line, lm, say)
    machine = {k: v for k, v in hardware.fingerprint().items() if launching.here or k not in MACHINE_FIELDS}
    study_fingerprint = fingerprint(config, lm, machine)

    folder = Path(config.outputs) / config.study
    url = str(config.storage or storage.sqlite_url(folder / "study.db"))
    if (file := storage.sqlite_file(url)) is not None:
        outputs.make_folder(file.parent)
    storage.claim(url, config.study)
    study = open_study(config.study, url, study_objectives, study_fingerprint, limits)
    outputs.claim(study, folder)
    _write_spec(folder, lm)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    launching.prepare(config.workers)

    run_trial, run_confirmation = _job_runners(study, folder, command_line, launching, devices)
    tracker = _tracker(config, folder)
    run = Search(
        study=study,
        space=space,
        policy=policy,
        forecaster=forecaster.forecasts(config, folder, limits),
        launch=run_trial,
        budget=budget,
        folder=folder,
        shared=_shared_overrides(config, command_line.shared),
        views=Views(folder, say, tracker),
        log=say,
        first=first,
        first_trials=config.first_trials,
        keep=config.keep,
        workers=config.workers,
        convergence=convergence,
        confirm=functools.partial(holdout.confirm, study, run_confirmation, config.workers, folder, say)
        if config.confirm
        else None,
    )
    signal.signal(signal.SIGTERM, _interrupt)  # Slurm stops a job this way
    say(
        f"search: {len(space.methods)} methods, objectives {', '.join(o.name for o in study_objectives)}; study in {folder}"
    )
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


def _check_settings(config: DictConfig) -> None:
    """Raises UserError for a setting that a trial would refuse or that has no meaning."""
    build.calibration(config)
    check_scalars(Run, {"seed": config.seed})
    check_seed(config.seed)
    if re.search(r"[\x00-\x1f]|\$\{|(^|/)\.{1,2}(/|$)", str(config.study)):
        raise UserError(
            f"study={config.study} is no name of a folder; give one without line breaks, dots alone, and ${{"
        )
    _build(Settings, {field.name: config[field.name] for field in dataclasses.fields(Settings)})
    _build(Limits, config.limits, "limits")
    _build(Racing, config.racing, "racing")


def _check_fixed(config: DictConfig, space: Space) -> None:
    """Raises UserError for a fixed setting of a method that all its trials would refuse."""
    for method in (method for method in space.methods if method.fixed):
        prefix = f"method.{method.name}."
        knobs = method.defaults(functools.partial(OmegaConf.select, config))
        settings = {key.removeprefix(prefix): value for key, value in knobs.items()}
        node = {"_target_": config.method[method.name]._target_, **settings}
        build.instantiate(OmegaConf.create(node), prefix.strip("."))


def _pin_model(
    config: DictConfig, command_line: overrides.CommandLine, lm: LM
) -> tuple[DictConfig, overrides.CommandLine]:
    """Returns configuration and command line with the folder of the base model, if it differs from `model.path`."""
    path = config.model.get("path")
    if not lm.path or not path or Path(lm.path) == Path(path):
        return config, command_line
    config = copy.deepcopy(config)
    config.model.path, config.model.name = lm.path, lm.name
    return config, command_line.with_model(lm)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a dataclass from settings after checking their types."""
    check_scalars(kind, values, where)
    return kind(**values)


def fingerprint(config: DictConfig, lm: LM, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that must be equal for two trials to be comparable."""
    from winnow.data import corpus
    from winnow.model import manifest

    content: str | None = build.benchmark(config).content()  # type: ignore[attr-defined]
    calibration = build.calibration(config)
    model = OmegaConf.to_container(config.model, resolve=True)
    benchmark = OmegaConf.to_container(config.benchmark, resolve=True)
    assert isinstance(model, dict) and isinstance(benchmark, dict)
    model_fields = {k: v for k, v in model.items() if k in ("name", "dtype", "attention")}
    return {
        "model": {**model_fields, "sha256": lm.sha256()},
        "benchmark": {k: v for k, v in benchmark.items() if not str(k).startswith("_")} | _content_entry(content),
        "hardware": dict(hardware),
        "calibration": dataclasses.asdict(calibration) | _content_entry(corpus.content(calibration)),
        "seed": config.seed,
        "versions": manifest.versions(),
    }


def _content_entry(sha256: str | None) -> dict[str, str]:
    return {} if sha256 is None else {"content": sha256}


def _policy(config: DictConfig, space: Space) -> Policy:
    """Builds the policy; raises UserError if an API key or a terminal that it needs is missing."""
    defaults = functools.partial(OmegaConf.select, config)
    if config.recipe is not None:
        return read_recipe(OmegaConf.to_container(config.recipe, resolve=True), space, defaults)  # type: ignore[arg-type]
    policy = build.policy(config)
    if not config.interactive:
        return policy
    from winnow.agent.interactive import Interactive, check_terminal

    check_terminal()
    return Interactive(policy, defaults)


def first_strategies(space: Space, config: DictConfig) -> list[Strategy]:
    """Returns each method of the slots in `first_slots` alone, at its defaults; the search tries some of them before the policy."""
    slots = set()
    for name in config.first_slots:
        if str(name).upper() not in Slot.__members__:
            slot_names = ", ".join(slot.name.lower() for slot in Slot)
            raise UserError(f"first_slots=[{name}]: there is no such slot; they are {slot_names}")
        slots.add(Slot[str(name).upper()])
    defaults = functools.partial(OmegaConf.select, config)
    return [Strategy((m.name,), m.defaults(defaults)) for m in space.methods if m.slot in slots]


def _shared_overrides(config: DictConfig, typed: Sequence[str]) -> list[str]:
    """Returns the overrides that the command lines of a trial need: the chosen config groups and what the user typed."""
    groups = {o.split("=")[0] for o in typed}
    choices = config.hydra.runtime.choices
    chosen = [f"{group}={choices[group]}" for group in ("model", "benchmark", "hardware") if group not in groups]
    holdout_share = [f"benchmark.holdout_share={config.confirm}"] if config.confirm else []
    return [*chosen, *typed, *holdout_share]


def _write_spec(folder: Path, lm: LM) -> None:
    """Writes `model_spec.json`, the specification of the base model, in a child process because that needs torch."""
    path = folder / "model_spec.json"
    if not path.is_file():
        try:
            arguments = {"path": lm.path, "loading": dataclasses.asdict(lm.loading)}
            result = child.call("winnow.search.start:model_spec", arguments, child.Limits(), say, folder / "log.txt")
        except child.Failed as failed:
            raise UserError(f"model.path={lm.path} cannot be read: {failed.message}") from None
        write_json(path, result)


def model_spec(path: str, loading: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Runs in the child: returns the specification of the model at `path`."""
    from winnow.model.spec import spec

    return spec(LM(path, loading=Loading(**loading)).config()).to_json()


def _tracker(config: DictConfig, folder: Path) -> Any:
    if config.wandb.mode == "disabled":
        return None
    from winnow.report.tracking import Tracker

    return Tracker(folder=folder, log=say, **config.wandb)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
