"""From a composed `conf/search.yaml` to a running `Search`: everything is checked before anything is written."""

from __future__ import annotations

import functools
import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.agent.policy import Policy
from winnow.cli import say
from winnow.search import child, outlook, overrides, trial
from winnow.search.budget import Budget, Convergence
from winnow.search.gates import Racing
from winnow.search.loop import KEEP, Search
from winnow.search.objectives import constraints, objectives
from winnow.search.space import Space, read_space
from winnow.search.study import Proposal, open_study
from winnow.search.views import Views
from winnow.types import LM, Reason, Slot, Strategy, UserError


def search(
    config: DictConfig,
    arguments: Sequence[str],
    launch: Callable[[int, list[str]], Any],
    validate: Callable[[list[list[str]]], None],
) -> None:
    """Runs the search that `config` and the command line describe, and prints its front.

    Args:
        config: the composed configuration; `method` holds the methods of the space.
        arguments: the overrides as typed.
        launch: runs one job of a number with overrides, and returns Hydra's JobReturn.
        validate: Hydra's check that overrides compose.
    """
    from winnow.report.table import front_table

    typed = overrides.parse(arguments)
    space = read_space(OmegaConf.to_container(config.method, resolve=True) or {}, typed.narrowed)  # type: ignore[arg-type]
    if config.keep not in KEEP:
        raise UserError(f"keep={config.keep} is not known; it is one of {', '.join(KEEP)}")
    budget, convergence = Budget(**config.budget), Convergence(config.convergence)
    Racing(**config.racing)
    lm, hardware, benchmark = build.model(config, not config.dry_run), build.hardware(config), build.benchmark(config)
    scores = benchmark.scores()
    wanted = objectives(list(config.objectives), scores)
    limits = constraints(dict(config.constraints), scores)
    if config.dry_run:
        from winnow.report.dry_run import search_table

        print(search_table(config, space, budget))
        return
    policy = _policy(config)
    hardware.check()
    held = fingerprint(config, lm, hardware.fingerprint())
    stages = [build.target_of(config.method[name]["_target_"]) for name in config.method]
    preload = sorted({module for stage in stages for module in stage.preload})
    child.start_server(preload)

    folder = Path(config.outputs) / config.study
    storage = str(config.storage or f"sqlite:///{folder / 'study.db'}")
    if storage.startswith("sqlite:///"):
        _make(folder)
    study = open_study(config.study, storage, wanted, held, limits)
    _make(folder)
    _write_spec(folder, lm)

    def run_trial(proposal: Proposal, worker: int) -> dict[str, Any]:
        lines = typed.of_trial(proposal.strategy)
        validate([lines])
        job = launch(proposal.number, lines)
        if job.status.name != "COMPLETED":
            error = job._return_value  # `return_value` would raise it
            if isinstance(error, KeyboardInterrupt):
                raise error
            return trial.failure(Reason.ERROR, child.describe(error))
        return job.return_value  # type: ignore[no-any-return]

    tracker = _tracker(config, folder)
    run = Search(
        study=study,
        space=space,
        policy=policy,
        outlook=outlook.forecasts(config, folder, wanted, limits),
        launch=run_trial,
        budget=budget,
        folder=folder,
        shared=_shared(config, typed.shared),
        views=Views(folder, say, tracker),
        log=say,
        first=_first(space, config),
        keep=config.keep,
        workers=config.workers,
        convergence=convergence,
    )
    logging.getLogger("hydra").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)  # Slurm's way of asking
    say(f"search: {len(space.methods)} methods, objectives {', '.join(o.name for o in wanted)}; study in {folder}")
    run.run()
    print(front_table(study.summary()))
    print(f"report: {(folder / 'report.html').resolve()}")


def fingerprint(config: DictConfig, lm: LM, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two trials to be comparable."""
    from winnow.model import manifest

    model = OmegaConf.to_container(config.model, resolve=True)
    benchmark = OmegaConf.to_container(config.benchmark, resolve=True)
    assert isinstance(model, dict) and isinstance(benchmark, dict)
    kept = {k: v for k, v in model.items() if k in ("name", "dtype", "attention")}
    return {
        "model": {**kept, "sha256": lm.sha256()},
        "benchmark": {k: v for k, v in benchmark.items() if not str(k).startswith("_")},
        "hardware": dict(hardware),
        "calibration": OmegaConf.to_container(config.calibration, resolve=True),
        "seed": config.seed,
        "versions": manifest.versions(),
    }


def _policy(config: DictConfig) -> Policy:
    """Who proposes; what it needs, a key or a terminal, is asked for now."""
    policy = build.policy(config)
    if not config.interactive:
        return policy
    from winnow.agent.interactive import Interactive, check_terminal

    check_terminal()
    return Interactive(policy, functools.partial(OmegaConf.select, config))


def _first(space: Space, config: DictConfig) -> list[Strategy]:
    """Each method of the slots in `first_slots` alone, at its defaults and at every choice of its first knob.

    A rough front, ends included, before the policy begins.
    """
    slots = {Slot[name.upper()] for name in config.first_slots}
    found = []
    for method in space.methods:
        if method.slot not in slots:
            continue
        defaults = method.defaults(functools.partial(OmegaConf.select, config))
        found.append(Strategy((method.name,), defaults))
        for main in method.dimensions[:1]:
            found += [Strategy((method.name,), {**defaults, main.key: choice}) for choice in main.choices]
    return list({s.overrides: s for s in found}.values())


def _shared(config: DictConfig, typed: Sequence[str]) -> list[str]:
    """The settings that a trial's own command lines need: the groups chosen, and what the user typed."""
    groups = {o.split("=")[0] for o in typed}
    choices = config.hydra.runtime.choices
    chosen = [f"{group}={choices[group]}" for group in ("model", "benchmark", "hardware") if group not in groups]
    return [*chosen, *typed]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"outputs={folder.parent}: cannot write there ({error.strerror}); choose another place"
        ) from error


def _write_spec(folder: Path, lm: LM) -> None:
    """`model_spec.json`: what is known of the base model from its configuration alone. In a child: it needs torch."""
    path = folder / "model_spec.json"
    if not path.is_file():
        try:
            result = child.call(
                "winnow.search.start:model_spec", {"path": lm.path}, child.Limits(), say, folder / "log.txt"
            )
        except child.Failed as failed:
            raise UserError(f"model.path={lm.path} cannot be read: {failed.message}") from None
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def model_spec(path: str, log: Callable[[str], None]) -> dict[str, Any]:
    """In the child: the specification of the model at `path`."""
    from winnow.model.spec import spec

    return spec(path).to_json()


def _tracker(config: DictConfig, folder: Path) -> Any:
    if config.wandb.mode == "disabled":
        return None
    from winnow.report.tracking import Tracker

    return Tracker(folder=folder, log=say, **config.wandb)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
