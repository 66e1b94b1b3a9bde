"""Builds the W&B runs of a study as plain values: a run for each trial and the run `front`. Imports no wandb."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.core.formats import axes_of, plain, total_seconds
from winnow.core.types import Summary, Trial
from winnow.report.facts import base_of, quality_of, size_of
from winnow.report.table import state_of

NAME_LENGTH = 120  # W&B refuses names of more than 128 characters


@dataclass(frozen=True)
class Entry:
    """A W&B run."""

    id: str
    name: str
    kind: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    failed: bool = False
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None
    plot: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        return digest_of([self.name, self.config, self.summary, self.tags, self.failed, self.table, self.plot])


def run_id(summary: Summary, name: object) -> str:
    """Returns the id of a trial's run, which depends on the study and the trial number alone."""
    return f"{digest_of([summary.name, summary.fingerprint])[:12]}-{name}"


def trial_entry(summary: Summary, trial: Trial) -> Entry:
    """Returns a trial as a run: the strategy is its configuration, the figures and their sources are its summary."""
    strategy = trial.strategy
    config = {
        "study": summary.name,
        "trial": trial.number,
        "strategy": str(strategy),
        "method": list(strategy.methods),
        "proposed_by": trial.proposed_by,
        "commands": list(trial.commands),
        **strategy.knobs,
    }
    values: dict[str, Any] = {"state": state_of(trial)}
    values |= {name: value for name, value in trial.figures.items() if math.isfinite(value)}
    values |= {f"source/{name}": source for name, source in trial.sources.items()}
    values |= {f"seconds/{name}": value for name, value in trial.seconds.items() if math.isfinite(value)}
    if not trial.complete:
        values |= {"reason": str(trial.reason), "message": trial.message}
    tags = ("base",) if trial.number == 0 else ()
    name = f"{trial.number} {plain(str(strategy))}"
    return Entry(
        id=run_id(summary, trial.number),
        name=name,
        kind="trial",
        config=json.loads(json.dumps(config, default=str)),
        summary=values,
        tags=tags if trial.complete else (*tags, state_of(trial), str(trial.reason)),
        failed=trial.failed,
    )


def front_entry(summary: Summary) -> Entry:
    """Returns the run `front`: a table of all trials. Only this run has `is_pareto`, because it changes as the study grows."""
    axes = axes_of(summary)
    on_front = set(summary.front)
    columns = ["trial", "strategy", "is_pareto", "state", "reason", *(axis.name for axis in axes)]
    rows = [
        [
            trial.number,
            str(trial.strategy),
            trial.number in on_front,
            state_of(trial),
            str(trial.reason or ""),
            *(_finite(trial.figures.get(axis.name)) for axis in axes),
            _finite(total_seconds(trial)),
            trial.proposed_by,
        ]
        for trial in summary.trials
    ]
    base = base_of(summary)
    values: dict[str, Any] = {"trials": len(summary.trials), "on_front": len(on_front)}
    if summary.hypervolume and math.isfinite(summary.hypervolume[-1]):
        values["hypervolume"] = summary.hypervolume[-1]
    if base is not None:
        values |= {f"base/{name}": value for name, value in base.figures.items() if math.isfinite(value)}
    return Entry(
        id=run_id(summary, "front"),
        name=f"front of {plain(summary.name)}",
        kind="front",
        config=json.loads(json.dumps({"study": summary.name, "fingerprint": dict(summary.fingerprint)}, default=str)),
        summary=values,
        table=([*columns, "seconds", "proposed_by"], rows),
        plot=front_plot(summary),
    )


def front_plot(summary: Summary) -> dict[str, Any] | None:
    """Returns a plotly figure of the score over the size, with the front in its own colour; None without both figures."""
    quality, size = quality_of(summary), size_of(summary)
    if quality is None or size is None:
        return None
    axes = {axis.name: axis for axis in axes_of(summary)}
    x, y = axes[size], axes[quality.name]
    on_front = set(summary.front)
    plotted = [
        t for t in summary.trials if math.isfinite(t.figures.get(x.name, math.nan) + t.figures.get(y.name, math.nan))
    ]
    traces = []
    for name, front, colour in (("dominated", False, "#929ca7"), ("front", True, "#0a7560")):
        trials = sorted((t for t in plotted if (t.number in on_front) == front), key=lambda t: t.figures[x.name])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [t.figures[x.name] / x.factor for t in trials],
                "y": [t.figures[y.name] / y.factor for t in trials],
                "text": [f"trial {t.number}" for t in trials],
                "marker": {"color": colour, "size": 11 if front else 7},
            }
        )
    return {"data": traces, "layout": {"xaxis": {"title": {"text": x.title}}, "yaxis": {"title": {"text": y.title}}}}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
