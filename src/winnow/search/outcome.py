"""Writes and reads `outcome.json`, the result of a job, and turns an outcome into the record of a trial."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.errors import Reason
from winnow.core.files import atomic_write
from winnow.core.types import Objective, Trial
from winnow.study.study import Proposal

OUTCOME = "outcome.json"


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """Returns the outcome in the folder of a trial; None if the trial did not finish."""
    try:
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def failure(reason: Reason, message: str) -> dict[str, Any]:
    """Returns the outcome of a trial that did not even start."""
    return {"figures": {}, "sources": {}, "reason": reason.value, "message": message, "seconds": {}}


def write_outcome(folder: Path, outcome: dict[str, Any]) -> None:
    """Writes an outcome to the disk in one piece: after that a kill cannot lose the trial."""
    with atomic_write(folder / OUTCOME) as scratch, scratch.open("w", encoding="utf-8") as file:
        json.dump(outcome, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def trial_from_outcome(
    proposal: Proposal,
    outcome: Mapping[str, Any],
    objectives: Sequence[Objective],
    commands: tuple[str, str],
    seconds: float | None = None,
) -> Trial:
    """Returns the record of a trial; an outcome without a finite value for every objective is a failure.

    Args:
        commands: the command lines that reproduce the trial.
        seconds: wall time of the whole trial; None if it is not known.
    """
    reason = Reason(outcome["reason"]) if outcome["reason"] else None
    message, figures = outcome["message"], outcome["figures"]
    if reason is None:
        bad = [o.name for o in objectives if not math.isfinite(figures.get(o.name, math.nan))]
        if bad:
            reason, message = Reason.NOT_FINITE, f"{', '.join(bad)} is not a finite number"
    suggestion = proposal.suggestion
    decision = {"why": suggestion.why, "expected_gain": suggestion.expected_gain, **suggestion.record}
    return Trial(
        number=proposal.number,
        strategy=proposal.strategy,
        figures=figures,
        sources=outcome["sources"],
        reason=reason,
        message=message,
        estimates=outcome.get("estimates", {}),
        seconds={**outcome["seconds"], **({} if seconds is None else {"total": round(seconds, 3)})},
        energy=outcome.get("energy", {}),
        stages=outcome.get("stages", []),
        commands=commands,
        proposed_by=suggestion.by,
        decision=decision,
    )
