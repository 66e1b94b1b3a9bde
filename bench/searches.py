"""One search over the table of all strategies: ours as it is, or a peer's, and what it had found after so many seconds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import moocore
import numpy as np
import table as tables
from replay import OBJECTIVES, Looked, Replay, front_points, full_cost

from winnow.build.job_settings import Racing
from winnow.core.types import Strategy
from winnow.study import pareto

SHARE = 0.99


class World:
    """The table, and the hypervolume of any part of it relative to that of all of it."""

    def __init__(self) -> None:
        self.table, self.space = tables.load(), tables.space()
        self.slots = {method.name: method.slot for method in self.space.methods}
        points = front_points(self.table)
        self.low, self.high = points.min(0), points.max(0)
        self.scaled = (points - self.low) / (self.high - self.low)
        self.reference = np.full(len(OBJECTIVES), 1 + pareto.MARGIN)
        self.numbers = {row.strategy.overrides: n for n, row in enumerate(self.table.rows)}
        self.whole = self.volume(self.scaled)

    def volume(self, points: np.ndarray) -> float:
        return float(moocore.hypervolume(points, ref=self.reference)) if len(points) else 0.0

    def share(self, rows: Sequence[int]) -> float:
        return self.volume(self.scaled[list(rows)]) / self.whole


Curve = list[tuple[float, float]]  # seconds spent, share of the hypervolume


def ours(
    world: World,
    policy: Any,
    racing: Racing | None,
    cached: bool,
    seed: int,
    until: float = SHARE,
    budget: float = math.inf,
) -> Curve:
    """A search of ours until it has a share of the hypervolume, or has spent its budget, in seconds."""
    replay = Replay(world.table, policy, world.slots, racing, cached, first=first(world), seed=seed)
    curve: Curve = []
    rows: list[int] = []
    for trial in replay.run(world.space):
        if trial.complete:
            rows.append(world.numbers[trial.strategy.overrides])
            curve.append((replay.seconds, world.share(rows)))
            if curve[-1][1] >= until:
                break
        if replay.seconds >= budget:
            break
    return curve


@functools.cache  # it does not depend on the seed
def first(world: World) -> tuple[Strategy, ...]:
    """What `search.py` begins with."""
    from hydra import compose, initialize_config_dir

    from winnow.build.search_settings import default_of, first_strategies
    from winnow.core.cli import CONF
    from winnow.search.forecaster import smallest

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("search", overrides=[tables.METHODS])
    rows = {row.strategy.overrides: row for row in world.table.rows}
    return tuple(
        smallest(first_strategies(world.space, cfg.first_slots, default_of(cfg)), Looked(rows), cfg.first_trials)
    )


def peer(world: World, sampler: Any, until: float = SHARE) -> Curve:
    """An Optuna study with a sampler as its package has it; a strategy that it repeats, or that cannot be made, costs nothing."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=[o.direction for o in OBJECTIVES], sampler=sampler)
    curve: Curve = []
    rows: list[int] = []
    seconds = 0.0
    for _ in range(20 * len(world.table.rows)):
        trial = study.ask()
        row = world.numbers.get(world.space.draw(trial).overrides)
        if row is None:
            study.tell(trial, state=TrialState.FAIL)
            continue
        found = world.table.rows[row]
        if row not in rows:
            rows.append(row)
            seconds += full_cost(found)
            curve.append((seconds, world.share(rows)))
        study.tell(trial, [found.figures[o.name] for o in OBJECTIVES])
        if curve[-1][1] >= until or len(rows) == len(world.table.rows):
            break
    return curve


def peers() -> dict[str, Callable[[int], Any]]:
    import optuna

    return {
        "optuna random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "optuna TPE": lambda seed: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed),
        "optuna NSGA-II": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
        "optuna GPSampler": lambda seed: optuna.samplers.GPSampler(seed=seed),
    }


def agents() -> dict[str, Callable[[int], Any]]:
    from hydra import compose, initialize_config_dir

    from winnow.build import instantiate
    from winnow.core.cli import CONF

    def made(name: str, seed: int) -> Any:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("search", overrides=[f"agent={name}", f"seed={seed}"])
        return instantiate(cfg.agent, "agent")

    names = ("random", "tpe", "nsga2", "bandit", "gp", "portfolio")
    return {name: functools.partial(made, name) for name in names}


def reached(curve: Curve, share: float = SHARE) -> float:
    """Seconds until the share; infinite if it was not reached."""
    return next((seconds for seconds, volume in curve if volume >= share), float("inf"))


def at(curve: Curve, seconds: float) -> float:
    return max((volume for spent, volume in curve if spent <= seconds), default=0.0)
