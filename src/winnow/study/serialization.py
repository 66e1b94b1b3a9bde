"""Converts strategies and trials to and from the plain JSON that a study stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from winnow.core.errors import Reason
from winnow.core.types import Strategy, Trial

# keys of `benchmark` in studies of earlier versions -> their present names
RENAMED = {"held_back": "holdout_share", "confirming": "score_holdout"}


def strategy_json(strategy: Strategy) -> dict[str, Any]:
    return {"methods": list(strategy.methods), "knobs": dict(strategy.knobs)}


def strategy_from_json(data: Mapping[str, Any]) -> Strategy:
    return Strategy(tuple(data["methods"]), dict(data["knobs"]))


def trial_json(trial: Trial) -> dict[str, Any]:
    """Returns a trial as plain JSON; figures that are not finite become None."""
    figures = {k: v if math.isfinite(v) else None for k, v in trial.figures.items()}
    return {
        "number": trial.number,
        "strategy": strategy_json(trial.strategy),
        "figures": figures,
        "sources": dict(trial.sources),
        "reason": trial.reason.value if trial.reason else None,
        "message": trial.message,
        "estimates": dict(trial.estimates),
        "seconds": dict(trial.seconds),
        "energy": dict(trial.energy),
        "stages": [dict(stage) for stage in trial.stages],
        "commands": list(trial.commands),
        "proposed_by": trial.proposed_by,
        "decision": dict(trial.decision),
    }


def trial_from_json(data: Mapping[str, Any]) -> Trial:
    """Returns the trial that `trial_json` has converted."""
    return Trial(
        number=data["number"],
        strategy=strategy_from_json(data["strategy"]),
        figures={k: math.nan if v is None else v for k, v in data["figures"].items()},
        sources=data["sources"],
        reason=Reason(data["reason"]) if data["reason"] else None,
        message=data["message"],
        estimates=data["estimates"],
        seconds=data["seconds"],
        energy=data["energy"],
        stages=tuple(data["stages"]),
        commands=tuple(_command_from_text(command) for command in data["commands"]),
        proposed_by=data["proposed_by"],
        decision=data["decision"],
    )


def fingerprint_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored fingerprint under the present names of its settings."""
    benchmark = data.get("benchmark")
    if not isinstance(benchmark, dict):
        return dict(data)
    return {**data, "benchmark": {RENAMED.get(key, key): value for key, value in benchmark.items()}}


def _command_from_text(command: str) -> str:
    """Returns a stored command line under the present names of its settings, so that it can be run."""
    for old, new in RENAMED.items():
        command = command.replace(f"benchmark.{old}=", f"benchmark.{new}=")
    return command
