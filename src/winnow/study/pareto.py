"""Non-dominated points and hypervolume, by moocore.

The front does not rest on a figure whose measurement was disturbed: such a figure counts as worse than any other. So it puts no
other trial off the front, and its own trial is on the front only for what its other figures are worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from winnow.core.types import Objective, Trial

WORST = 1e300  # moocore 0.3.2 takes points for non-dominated that are infinite in two of four objectives


def points(trials: Sequence[Trial], objectives: Sequence[Objective]) -> np.ndarray:
    """Objective values [trials, objectives] of complete trials, signed so that less is better; `WORST` where disturbed."""
    signs = [-1.0 if o.maximize else 1.0 for o in objectives]
    rows = [
        [WORST if t.disturbed(o.name) else sign * t.figures[o.name] for o, sign in zip(objectives, signs, strict=True)]
        for t in trials
    ]
    return np.array(rows, dtype=float).reshape(len(rows), len(objectives))


def snapped(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """The values with positive columns of a resolution on a logarithmic grid of that step, so that near-equal ones are equal."""
    values = values.copy()
    for column, objective in enumerate(objectives):
        size = np.abs(values[:, column])
        if objective.resolution and (size > 0).all():
            values[:, column] = np.sign(values[:, column]) * np.round(np.log(size) / np.log1p(objective.resolution))
    return values


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[int, ...]:
    """Numbers of the complete trials that no other dominates, differences below an objective's resolution aside; of equal
    points the first."""
    import moocore

    complete = [t for t in trials if t.complete]
    if not complete:
        return ()
    keep = moocore.is_nondominated(snapped(points(complete, objectives), objectives), maximise=False, keep_weakly=False)
    return tuple(t.number for t, kept in zip(complete, keep, strict=True) if kept)


MARGIN = 0.1  # past the worst value, as a share of the range: so that extreme points count


def added(front: np.ndarray, point: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """The hypervolume that a point adds to a front, as a share of the box between `low` and a margin past `high`.

    Points of the front that are `WORST` in an objective dominate nothing in the box.
    """
    import moocore

    front = front[(front < WORST).all(1)]

    span = np.where(high > low, high - low, 1.0)
    reference = np.full(len(point), 1 + MARGIN)
    before = (front - low) / span
    after = np.vstack([before, (point - low) / span])
    volumes = [float(moocore.hypervolume(part, ref=reference)) if len(part) else 0.0 for part in (before, after)]
    return (volumes[1] - volumes[0]) / (1 + MARGIN) ** len(point)


def hypervolume_series(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The share of the box between the best and the worst values of the study that is dominated after each trial.

    Normalised over all complete trials, so the series of one study can be compared within itself only. Trials with an objective
    whose measurement was disturbed add nothing.
    """
    import moocore

    complete = [t for t in trials if t.complete and not any(t.disturbed(o.name) for o in objectives)]
    if not complete:
        return tuple(0.0 for _ in trials)
    values = points(complete, objectives)
    low, high = values.min(0), values.max(0)
    span = np.where(high > low, high - low, 1.0)
    scaled = dict(zip((t.number for t in complete), (values - low) / span, strict=True))
    reference = np.full(len(objectives), 1 + MARGIN)
    full = (1 + MARGIN) ** len(objectives)
    series, seen = [], []
    for trial in trials:
        if trial.number in scaled:
            seen.append(scaled[trial.number])
        series.append(float(moocore.hypervolume(np.array(seen), ref=reference)) / full if seen else 0.0)
    return tuple(series)


def is_at_least_as_good(rival: Trial, trial: Trial, others: Sequence[Objective]) -> bool:
    """Whether a rival is at least as good in these objectives, differences below their resolution aside.

    As on the front, a figure whose measurement was disturbed is worse than any other.
    """
    if not others:
        return True
    first, second = snapped(points([rival, trial], others), others)
    return bool((first <= second).all())


def fails_on_holdout(
    trial: Trial, front: Sequence[Trial], confirmed: Mapping[int, Mapping[str, float]], objectives: Sequence[Objective]
) -> str:
    """Why a trial's place on the front does not hold on fresh items; empty where it does, or nobody knows."""
    scores = [o for o in objectives if o.name in confirmed.get(trial.number, {})]
    others = [o for o in objectives if o not in scores]
    if not scores or any(o.name not in trial.figures for o in others):
        return ""
    mine = confirmed[trial.number]
    for rival in front:
        theirs = confirmed.get(rival.number)
        if rival.number == trial.number or theirs is None or not is_at_least_as_good(rival, trial, others):
            continue
        if all(theirs[o.name] >= mine[o.name] if o.maximize else theirs[o.name] <= mine[o.name] for o in scores):
            return f"trial {rival.number} is no worse in anything else, and as good on fresh items"
    return ""
