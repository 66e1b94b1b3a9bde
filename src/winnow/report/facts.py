"""Summarises a study in a sentence and in numbers: the base model, the front by size, the best within two points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from winnow.core.formats import Axis, axes_of, unit_of
from winnow.core.types import Objective, Summary, Trial

WITHIN_POINTS = 2.0  # the headline counts strategies whose score is at most this much below the base model's


def base_of(summary: Summary) -> Trial | None:
    """Returns the latest complete trial of the base model; None while it is unfinished or if it failed."""
    return next((t for t in reversed(summary.trials) if not t.strategy.methods and t.complete), None)


def front_of(summary: Summary) -> list[Trial]:
    """Returns the front, smallest first; by trial number if sizes are equal or unknown."""
    numbers, size = set(summary.front), size_of(summary)
    trials = [t for t in summary.trials if t.number in numbers]
    return sorted(trials, key=lambda t: (t.figures.get(size, math.inf) if size else 0.0, t.number))


def size_of(summary: Summary) -> str | None:
    """Returns the name of the figure that is the model's size: preferably an objective in bytes, else any figure in bytes."""
    objectives = [o.name for o in summary.objectives if unit_of(o.name, o.unit) == "B"]
    names = {name for trial in summary.trials for name in trial.figures}
    figures = sorted(name for name in names if unit_of(name) == "B")
    names_in_bytes = [*objectives, *figures]
    return next((name for name in names_in_bytes if "size" in name), names_in_bytes[0] if names_in_bytes else None)


def quality_of(summary: Summary) -> Objective | None:
    """Returns the objective that must not get worse: the first one to maximise."""
    return next((o for o in summary.objectives if o.maximize), None)


def points(objective: Objective | Axis, value: float | None, base: float | None) -> float | None:
    """Returns the change of a score from the base model in points (hundredths of the scale); None if it is not a score."""
    if not objective.maximize or objective.unit not in ("", "%") or value is None or base is None:
        return None
    if not math.isfinite(value) or not math.isfinite(base):
        return None
    if objective.unit == "%":
        return value - base
    return 100 * (value - base) if 0 <= base <= 1 and 0 <= value <= 1 else None


def ratio(value: float | None, base: float | None) -> float | None:
    """Returns the figure relative to the base model's; None if a value is missing, not finite, or the base is 0."""
    if value is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return None
    return value / base


def within_points(summary: Summary) -> list[Trial]:
    """Returns the strategies of the front whose score is within `WITHIN_POINTS` of the base model's, without the base model."""
    base, quality = base_of(summary), quality_of(summary)
    if base is None or quality is None:
        return []
    reference = base.figures.get(quality.name)
    changes = {t.number: points(quality, t.figures.get(quality.name), reference) for t in front_of(summary)}
    near = {n for n, change in changes.items() if change is not None and change >= -WITHIN_POINTS - 1e-9}
    return [t for t in front_of(summary) if t.number in near and t.number != base.number]


def best_within_points(summary: Summary, name: str) -> Trial | None:
    """Returns the strategy within `WITHIN_POINTS` that has the lowest undisturbed figure `name`."""
    candidates = [t for t in within_points(summary) if name in t.figures and not t.disturbed(name)]
    return min(candidates, key=lambda t: t.figures[name], default=None)


def counts(summary: Summary) -> dict[str, Any]:
    """Counts the trials by state, by reason of failure and by the agent that proposed them."""
    failed = [t for t in summary.trials if t.failed]
    stopped = sum(t.stopped for t in summary.trials)
    return {
        "trials": len(summary.trials),
        "complete": len(summary.trials) - len(failed) - stopped,
        "stopped": stopped,
        "failed": len(failed),
        "front": len(summary.front),
        "failed_by_reason": dict(Counter(str(t.reason) for t in failed)),
        "proposed_by": dict(Counter(t.proposed_by or "unknown" for t in summary.trials)),
    }


def headline(summary: Summary) -> str:
    """Returns the study in one or two sentences."""
    if not any(t.complete and t.number for t in summary.trials):
        return "No strategy has a finished trial yet."
    count = len(summary.front)
    text = f"{count} {'strategy' if count == 1 else 'strategies'} on the front."
    base, quality, size = base_of(summary), quality_of(summary), size_of(summary)
    if base is None:
        return f"{text} The base model has no finished trial, so nothing is relative to it."
    if quality is None or size is None:
        return text
    best = best_within_points(summary, size)
    if best is None:
        return f"{text} None but the base model is within {WITHIN_POINTS:g} points of it."
    axes = {axis.name: axis for axis in axes_of(summary)}
    share = ratio(best.figures[size], base.figures.get(size))
    return (
        f"{text} The smallest within {WITHIN_POINTS:g} points of the base model: {axes[size].show(best.figures[size])}"
        + (f", {share:.2f} of its size" if share is not None else "")
        + f", {axes[quality.name].label} {axes[quality.name].show(best.figures[quality.name])}"
        + f" against {axes[quality.name].show(base.figures[quality.name])}."
    )


ENERGY = "energy_wh_per_1k_tokens"


def payback(summary: Summary) -> str:
    """Returns the energy that the search took, and after how many served tokens the best strategy repays it."""
    wh, co2_g = (
        summary.energy.get(name, sum(trial.energy.get(name, 0.0) for trial in summary.trials))
        for name in ("wh", "co2_g")
    )
    if not wh:
        return ""
    text = f"The search took {wh:,.3g} Wh ({co2_g:,.3g} g CO2)"
    base, best = base_of(summary), best_within_points(summary, ENERGY)
    if base is None or best is None or ENERGY not in base.figures or base.disturbed(ENERGY):
        return f"{text}."
    saved = base.figures[ENERGY] - best.figures[ENERGY]
    if saved <= 0:
        return f"{text}; none that keeps the score takes less energy than the base model."
    return f"{text}, which trial {best.number} saves within {1000 * wh / saved:,.3g} served tokens."


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the values for JSON, which has no NaN and no infinity: None for a figure that is not finite."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
