"""Computes non-dominated points and hypervolume, with moocore.

The front does not rest on a figure whose measurement was disturbed: such a figure counts as worse than any other. So it removes
no other trial from the front, and its own trial is on the front only because of its other figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from winnow.core.types import Objective, Trial

WORST = 1e300  # not infinite: moocore 0.3.2 treats points that are infinite in two of four objectives as non-dominated


def points(trials: Sequence[Trial], objectives: Sequence[Objective]) -> np.ndarray:
    """Returns objective values [trials, objectives] of complete trials, signed so that less is better; `WORST` where disturbed."""
    signs = [-1.0 if o.maximize else 1.0 for o in objectives]
    rows = [
        [WORST if t.disturbed(o.name) else sign * t.figures[o.name] for o, sign in zip(objectives, signs, strict=True)]
        for t in trials
    ]
    return np.array(rows, dtype=float).reshape(len(rows), len(objectives))


def snap_to_resolution(values: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Rounds columns without zeros to a logarithmic grid with the resolution as step, so that near-equal values are equal."""
    values = values.copy()
    for column, objective in enumerate(objectives):
        size = np.abs(values[:, column])
        if objective.resolution and (size > 0).all():
            values[:, column] = np.sign(values[:, column]) * np.round(np.log(size) / np.log1p(objective.resolution))
    return values


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[int, ...]:
    """Returns the numbers of the complete trials that no other dominates, and of equal ones the first.

    Values that differ by less than an objective's resolution are equal.
    """
    import moocore

    complete = [t for t in trials if t.complete]
    if not complete:
        return ()
    values = snap_to_resolution(points(complete, objectives), objectives)
    mask = moocore.is_nondominated(values, maximise=False, keep_weakly=False)
    return tuple(t.number for t, nondominated in zip(complete, mask, strict=True) if nondominated)


# distance of the reference point past the worst value, as a share of the range: so that extreme points count
MARGIN = 0.1


def hypervolume_gain(front: np.ndarray, point: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Returns the hypervolume that a point adds to a front, as a share of the box between `low` and a margin past `high`.

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
    """Returns the share of the box between the best and the worst values of the study that is dominated after each trial.

    The series is normalised over all complete trials, so it can be compared within one study only. Trials with an objective
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
    series, dominating = [], []
    for trial in trials:
        if trial.number in scaled:
            dominating.append(scaled[trial.number])
        volume = float(moocore.hypervolume(np.array(dominating), ref=reference)) / full if dominating else 0.0
        series.append(volume)
    return tuple(series)


def is_at_least_as_good(rival: Trial, trial: Trial, objectives: Sequence[Objective]) -> bool:
    """Returns True if a rival is at least as good in these objectives, differences below their resolution aside.

    As on the front, a figure whose measurement was disturbed is worse than any other.
    """
    if not objectives:
        return True
    first, second = snap_to_resolution(points([rival, trial], objectives), objectives)
    return bool((first <= second).all())


def fails_on_holdout(
    trial: Trial, front: Sequence[Trial], confirmed: Mapping[int, Mapping[str, float]], objectives: Sequence[Objective]
) -> str:
    """Returns why a trial loses its place on the front with holdout scores; "" if it keeps the place or has no such scores.

    Args:
        confirmed: scores on holdout items, by trial number.
    """
    scored = [o for o in objectives if o.name in confirmed.get(trial.number, {})]
    unscored = [o for o in objectives if o not in scored]
    if not scored or any(o.name not in trial.figures for o in unscored):
        return ""
    scores = confirmed[trial.number]
    for rival in front:
        rival_scores = confirmed.get(rival.number)
        if rival.number == trial.number or rival_scores is None or not is_at_least_as_good(rival, trial, unscored):
            continue
        if all(
            rival_scores[o.name] >= scores[o.name] if o.maximize else rival_scores[o.name] <= scores[o.name]
            for o in scored
        ):
            return f"trial {rival.number} is no worse in anything else, and as good on fresh items"
    return ""
