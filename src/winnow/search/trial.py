"""One trial: compress in a child process, load the artifact back and evaluate it in another, and say how it went.

Two children, because memory is measured: what compressing held must not count for what serving holds.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.files import whole
from winnow.model import manifest
from winnow.search import child
from winnow.types import Reason, UserError

OUTCOME = "outcome.json"
RIVALS = (
    "rivals.json"  # in a trial's folder: what the base model is, its figures, those of each trial on the front then
)
STOP = "stop"  # a file there, put by the search: nobody waits for this trial any more
LOOK_S = 1.0  # between looks for it


def run(
    cfg: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs the trial that `cfg` describes; its outcome is written to `folder/outcome.json` in one piece, and returned.

    The outcome holds `overrides` (to know the trial again), `figures`, `sources`, `seconds`, `reason` and `message`.

    Args:
        environment: variables for the processes that do the work.

    Raises:
        child.Cancelled: the search is over, or has given this trial up; there is no outcome.
    """
    started = time.perf_counter()
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    cancelled = _Cancelled(folder)
    if cancelled():  # it has waited in a cluster's queue, say
        raise child.Cancelled(f"{folder} is no longer wanted")
    child.start_server(preloads(cfg))
    say = (lambda line: log(f"[{folder.name}] {line}")) if settings["workers"] > 1 else log  # whose line it is
    limits = child.Limits(60 * cfg.limits.minutes if cfg.limits.minutes else None, cfg.limits.memory_bytes)
    artifact, metrics = folder / "artifact", folder / "metrics"
    for leftover in (artifact, metrics):  # where a cluster starts a job once more
        shutil.rmtree(leftover, ignore_errors=True)
    outcome: dict[str, Any] = {"figures": {}, "sources": {}, "reason": None, "message": "", "stages": []}
    energy: dict[str, float] = {}
    seconds: dict[str, float] = {}
    try:
        for step, target in (("compress", artifact), ("evaluate", metrics)):
            step_started = time.perf_counter()
            left = limits.seconds and max(1.0, limits.seconds - (step_started - started))
            result = child.call(
                f"winnow.search.trial:{step}",
                {"settings": settings, "output": str(target), "artifact": str(artifact)},
                child.Limits(left, limits.memory_bytes),
                say,
                folder / "log.txt",
                environment,
                cancelled,
            )
            seconds[step] = result["seconds"]
            energy = {name: energy.get(name, 0.0) + used for name, used in result["energy"].items()}
            if step == "compress":
                shutil.copyfile(artifact / manifest.NAME, folder / manifest.NAME)  # stays when the weights go
                outcome["stages"] = _stages(manifest.read(artifact))
            else:
                for path in list(metrics.iterdir()):
                    path.replace(folder / path.name)
                metrics.rmdir()
                seconds |= result["parts"]
                outcome |= {"figures": result["figures"], "sources": result["sources"], **result["stopped"]}
    except child.Failed as failed:
        outcome |= {"reason": failed.reason.value, "message": failed.message, "figures": {}, "sources": {}}
    seconds["total"] = round(time.perf_counter() - started, 3)
    outcome |= {"seconds": seconds, "energy": energy}
    outcome["overrides"] = list(overrides)
    write_outcome(folder, outcome)
    return outcome


class _Cancelled:
    """Whether the search has put its sign into the folder of a trial, or has removed the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._next = folder, 0.0

    def __call__(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LOOK_S
        return (self._folder / STOP).exists() or not self._folder.exists()


def preloads(cfg: DictConfig) -> list[str]:
    """Modules that the stages of `cfg.method` and the benchmark want imported once, in the fork server."""
    users = [build.target_of(node["_target_"]) for node in [*build.methods(cfg).values(), cfg.benchmark]]
    return sorted({module for user in users for module in user.preload})


def compress(settings: dict[str, Any], output: str, artifact: str, log: Callable[[str], None]) -> dict[str, Any]:
    """In the child: `compress.py`'s work."""
    from winnow import commands

    # W&B sees the whole study (`winnow.report.tracking`), not the curves of each trial
    quiet = {**settings["wandb"], "mode": "disabled"}
    with _Cost(settings) as cost:
        cfg = OmegaConf.create({**settings, "output": output, "wandb": quiet})
        _check_base(cfg, Path(output).parent)
        commands.compress(cfg, log)
    return cost.record()


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
    from winnow.search.gates import Gates

    model = {**settings["model"], "_target_": "winnow.model.load.pretrained", "path": artifact}
    gates = Gates(OmegaConf.create(settings), Path(output).parent, log)
    with _Cost(settings) as cost:
        metrics = commands.evaluate(OmegaConf.create({**settings, "model": model, "output": output}), log, gates)
    return {
        "figures": metrics["figures"],
        "sources": metrics["sources"],
        "stopped": metrics.get("stopped", {}),
        "parts": metrics["seconds"],
        **cost.record(),
    }


class _Cost:
    """Time and energy of a block."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from winnow.hardware.energy import EnergyMeter

        self._meter = EnergyMeter(settings["hardware"]["carbon_g_per_kwh"])

    def __enter__(self) -> _Cost:
        self._started = time.perf_counter()
        self._energy = self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)
        self.seconds = round(time.perf_counter() - self._started, 3)

    def record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "energy": {"wh": self._energy.wh, "co2_g": self._energy.co2_g}}


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
