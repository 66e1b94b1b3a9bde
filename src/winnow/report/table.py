"""Formats the front as text for the terminal, and as the contents of `front.json` and `final_results.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from winnow.core.formats import (
    DISTURBED_LEGEND,
    Axis,
    axes_of,
    directions,
    duration,
    human,
    label_of,
    mark,
    plain,
    total_seconds,
)
from winnow.core.types import Objective, Summary, Trial
from winnow.report.facts import base_of, counts, finite, front_of, headline, payback, points, ratio


def front_table(summary: Summary) -> str:
    """Returns the front as text, smallest first: each objective with its unit, and relative to the base model.

    Scores are compared in points (`-1.2 pts`), everything else as a multiple (`0.32x`).
    """
    base = base_of(summary)
    axes = axes_of(summary)[: len(summary.objectives)]
    tally = counts(summary)
    lines = [
        f"{plain(summary.name)}: {tally['front']} on the front of {tally['complete']} complete trials"
        + (f", {tally['stopped']} stopped early" if tally["stopped"] else "")
        + (f", {tally['failed']} failed" if tally["failed"] else ""),
        directions(axes),
    ]
    if base is not None:
        lines.append(
            "base model: "
            + ", ".join(f"{a.label} {a.show(base.figures.get(a.name))}{mark(base, a.name)}" for a in axes)
        )
    headings = [("trial", ""), ("strategy", "<")]
    for axis in axes:
        headings += [(axis.label, ""), ("", "")]
    fresh = [axis for axis in axes if any(axis.name in scores for scores in summary.confirmed.values())]
    headings += [(f"{axis.label} on fresh items", "") for axis in fresh]
    lucky = holdout_failures(summary)
    rows = [[text for text, _ in headings]]
    for trial in front_of(summary):
        row = [str(trial.number), plain(str(trial.strategy))]
        for axis in axes:
            value = trial.figures.get(axis.name)
            base_value = base.figures.get(axis.name) if base is not None and trial.number != base.number else None
            row += [axis.show(value) + mark(trial, axis.name), relative(axis, value, base_value)]
        holdout_scores = summary.confirmed.get(trial.number, {})
        row += [axis.show(holdout_scores.get(axis.name)) + (" *" if lucky.get(trial.number) else "") for axis in fresh]
        rows.append(row)
    if payback_text := payback(summary):
        lines.append(payback_text)
    notes = [
        f"trial {t.number}: not confirmed: {unconfirmed(summary, t)}"
        for t in front_of(summary)
        if unconfirmed(summary, t)
    ]
    notes += [f"* trial {number}: luck: {why}" for number, why in lucky.items()]
    if any(mark(t, axis.name) for t in (*front_of(summary), *([base] if base else [])) for axis in axes):
        notes.append(DISTURBED_LEGEND)
    return "\n".join([*lines, "", *aligned(rows, [side or ">" for _, side in headings]), *notes])


def holdout_failures(summary: Summary) -> dict[int, str]:
    """Returns the trials whose place on the front does not hold on the held-out items, with the reasons."""
    from winnow.study.pareto import fails_on_holdout

    front = front_of(summary)
    reasons = {trial.number: fails_on_holdout(trial, front, summary.confirmed, summary.objectives) for trial in front}
    return {number: why for number, why in reasons.items() if why}


def unconfirmed(summary: Summary, trial: Trial) -> str:
    """Returns in one line why a trial of the front has no scores on the held-out items; empty if nothing failed."""
    return plain(summary.unconfirmed.get(trial.number, "").strip().rpartition("\n")[2])


def aligned(rows: Sequence[Sequence[str]], sides: Sequence[str]) -> list[str]:
    """Formats rows of cells as lines with aligned columns; `sides` holds `<` or `>` for each column; empty columns are left out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, sides, widths, strict=True)
        lines.append("  ".join(f"{text:{side}{width}}" for text, side, width in cells if width).rstrip())
    return lines


def relative(axis: Axis, value: float | None, base: float | None) -> str:
    """Returns `-1.2 pts` for a score, `0.32x` for any other figure, empty if there is nothing to compare."""
    change = points(axis, value, base)
    if change is not None:
        return f"{change:+.1f} pts"
    share = ratio(value, base)
    return "" if share is None else f"{share:.2f}x"


def trial_line(trial: Trial, objectives: Sequence[Objective], front: Sequence[int]) -> str:
    """Returns one line of progress: `trial 7  rtn(bits=4)  accuracy 0.936  size 2.90 MB  12.3 s  front`."""
    parts = [f"trial {trial.number}", plain(str(trial.strategy))]
    if not trial.failed:
        for objective in objectives:
            value = trial.figures.get(objective.name)
            if value is not None:
                parts.append(
                    f"{label_of(objective.name)} {human(objective.name, value, objective.unit)}{mark(trial, objective.name)}"
                )
            elif objective.name in trial.estimates:
                guess = human(objective.name, trial.estimates[objective.name], objective.unit)
                parts.append(f"{label_of(objective.name)} about {guess}")
    if trial.stopped:
        share = trial.estimates.get("share_scored", 0.0)
        parts.append(f"stopped ({trial.reason}) with {share:.0%} of the items scored")
    elif trial.failed:
        # the last line of a traceback is the error itself
        message = plain(trial.message.strip().rpartition("\n")[2])
        parts.append(f"failed ({trial.reason}){': ' + message if message else ''}")
    seconds = total_seconds(trial)
    if seconds is not None:
        parts.append(duration(seconds))
    if trial.number in front:
        parts.append("front")
    return "  ".join(parts)


def trial_json(trial: Trial) -> dict[str, Any]:
    """Returns a trial for JSON; figures are in their own units, None if not finite."""
    return {
        "trial": trial.number,
        "state": state_of(trial),
        "strategy": str(trial.strategy),
        "methods": list(trial.strategy.methods),
        "overrides": list(trial.strategy.overrides),
        "figures": finite(trial.figures),
        "estimates": finite(trial.estimates),
        "sources": dict(trial.sources),
        "seconds": finite(trial.seconds),
        "commands": list(trial.commands),
        "proposed_by": trial.proposed_by,
    }


def state_of(trial: Trial) -> str:
    return "complete" if trial.complete else "stopped" if trial.stopped else "failed"


def front_json(summary: Summary) -> dict[str, Any]:
    """Returns the contents of `front.json`: the strategies of the front, smallest first, with what reproduces each of them."""
    base = base_of(summary)
    front_points = []
    lucky = holdout_failures(summary)
    for trial in front_of(summary):
        entry = trial_json(trial)
        if trial.number in summary.confirmed:
            entry |= {"confirmed": finite(summary.confirmed[trial.number]), "luck": lucky.get(trial.number, "")}
        elif why := unconfirmed(summary, trial):
            entry["unconfirmed"] = why
        if base is not None:
            shares = {o.name: ratio(trial.figures.get(o.name), base.figures.get(o.name)) for o in summary.objectives}
            entry["relative_to_base"] = shares
        front_points.append(entry)
    return {
        "study": summary.name,
        "fingerprint": dict(summary.fingerprint),
        "objectives": [{"name": o.name, "direction": o.direction, "unit": o.unit} for o in summary.objectives],
        "headline": headline(summary),
        "base": trial_json(base) if base is not None else None,
        "points": front_points,
    }


def results_json(summary: Summary) -> dict[str, Any]:
    """Returns the contents of `final_results.json`: the front and all trials, failed ones with their reasons."""
    on_front = set(summary.front)
    trials = []
    for trial in summary.trials:
        entry = trial_json(trial) | {"on_front": trial.number in on_front}
        if not trial.complete:
            entry |= {"reason": str(trial.reason), "message": trial.message}
        trials.append(entry)
    front = front_json(summary)
    numbers = [point["trial"] for point in front.pop("points")]
    return front | {
        "front": numbers,
        "counts": counts(summary),
        "hypervolume": [v if math.isfinite(v) else None for v in summary.hypervolume],
        "trials": trials,
    }
