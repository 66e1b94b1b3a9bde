"""What a search pays for the front: every agent, and Optuna's samplers as they come, over the table of all strategies.

    python bench/search_efficiency.py [seeds=50] [only=cost,racing,advisers,overhead]

Optuna's GPSampler, which takes a minute a search, is given few seeds. Each search is replayed with each
seed: its cost is the seconds that its trials took when they were really run. Ours are the search as it is, with its stage cache,
its gates and its races; peers pay every trial whole, and nothing for one they repeat.
`cost_vs_best_peer`, `cost_vs_random`: of our default agent, cost to 99 % of the hypervolume of the exhaustive front, against the
best of Optuna's TPE, NSGA-II and GPSampler, and against random search, medians. `racing_*`: random candidates against the fronts
of random parts of the table. `portfolio_*`: with scripted advisers in the place of a language model; what a real one brings
cannot be measured here. `proposal_ms_*`: of the search itself, for a proposal and its bookkeeping.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: searches are replayed on all cores, one each

import numpy as np
from advisers import advisers
from common import Result, report, spread
from replay import OBJECTIVES, OTHERS, ROUNDS, SCORES, draw, full_cost
from searches import SHARE, Curve, World, agents, at, ours, peer, peers, reached

from winnow.build.job_settings import Racing
from winnow.core.types import Strategy, Trial
from winnow.search.early_stopping import nearest_scored_trials
from winnow.search.folders import LATEST_COMPLETE
from winnow.study import pareto
from winnow.study.objectives import KL
from winnow.study.pareto import is_at_least_as_good

SLOW, SLOW_SEEDS = "optuna GPSampler", 8  # a minute a search
PLOT = Path(__file__).with_name("table") / "search_efficiency.html"


def cost(world: World, seeds: int) -> list[Result]:
    """Every search with every seed; prints quartiles, and draws the curves."""
    mine, theirs = agents(), peers()

    def curve(task: tuple[str, int]) -> Curve:
        name, seed = task
        warnings.simplefilter("ignore")
        if name in theirs:
            return peer(world, theirs[name](seed))
        return ours(world, mine[name.partition(",")[0]](seed), None if "," in name else Racing(), True, seed)

    curves: dict[str, list[Curve]] = {}
    for name in (*mine, "gp, all scored", *theirs):
        curves[name] = spread(
            curve, [(name, seed) for seed in range(min(seeds, SLOW_SEEDS) if name == SLOW else seeds)]
        )
        _line(name, curves[name])
    plot(curves)
    middle = {name: statistics.median(map(reached, found)) for name, found in curves.items()}
    best = min(middle[name] for name in peers() if name != "optuna random")
    took = middle["gp"]
    return [
        Result("cost_vs_best_peer", took / best, 1 / 4, "lower"),
        Result("cost_vs_random", took / middle["optuna random"], 1 / 10, "lower"),
    ]


def _line(name: str, curves: Sequence[Curve]) -> None:
    found = sorted(map(reached, curves))
    quartiles = np.quantile(found, [0.25, 0.5, 0.75], method="inverted_cdf")
    trials = statistics.median(len(curve) for curve in curves)
    print(
        f"{name:<18} {SHARE:.0%} of the hypervolume after {quartiles[1]:8,.0f} s "
        f"({quartiles[0]:,.0f} to {quartiles[2]:,.0f}), {trials:.0f} complete trials",
        flush=True,
    )


def plot(curves: dict[str, list[Curve]]) -> None:
    """Medians and quartiles of the hypervolume over cost, as a page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    colours = [
        "#0b7285",
        "#e8590c",
        "#5f3dc4",
        "#2b8a3e",
        "#c2255c",
        "#495057",
        "#f08c00",
        "#1864ab",
        "#862e9c",
        "#868e96",
        "#d6336c",
    ]
    for (name, found), colour in zip(curves.items(), colours, strict=False):
        end = max(curve[-1][0] for curve in found)
        grid = np.geomspace(20, max(end, 30), 120)
        values = np.array([[at(curve, seconds) for seconds in grid] for curve in found])
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        dash = "dash" if name.startswith("optuna") else "solid"
        figure.add_scatter(x=grid, y=middle, name=name, line={"color": colour, "dash": dash})
        band = {"fill": "toself", "fillcolor": colour, "opacity": 0.12, "line": {"width": 0}}
        figure.add_scatter(
            x=np.concatenate([grid, grid[::-1]]),
            y=np.concatenate([high, low[::-1]]),
            showlegend=False,
            hoverinfo="skip",
            **band,
        )
    figure.add_hline(y=SHARE, line={"color": "#868e96", "dash": "dot"})
    figure.update_layout(
        title="Hypervolume found for time spent: medians and quartiles",
        template="plotly_white",
        xaxis={"title": "seconds of compressing, measuring and scoring", "type": "log"},
        yaxis={"title": "share of the exhaustive front's hypervolume", "range": [0.5, 1.005]},
    )
    figure.write_html(PLOT, include_plotlyjs="cdn")
    print(f"plot: {PLOT}")


def races(world: World, count: int = 4000) -> list[Result]:
    """Random candidates against the fronts of random parts of the table; a false rejection is of one that would have been on it."""
    rng = np.random.default_rng(0)
    scored = wrong = open_ = 0
    trials = [Trial(n, r.strategy, figures=r.figures) for n, r in enumerate(world.table.rows)]
    items = len(world.table.items)
    for _ in range(count):
        part = rng.permutation(len(trials))[: int(rng.integers(10, len(trials)))]
        candidate, others = trials[part[0]], [trials[n] for n in part[1:]]
        front = [trials[n] for n in pareto.front(others, OBJECTIVES)]
        rivals = [t for t in front if is_at_least_as_good(t.figures, candidate.figures, OTHERS)]
        if not rivals:
            scored += items
            continue
        known = {t.number: t.figures[KL] for t in [*front, *others[-LATEST_COMPLETE:]]}
        alike = nearest_scored_trials(known, candidate.figures[KL])
        drawn = draw(world.table, [*alike, *(t.number for t in rivals)], rng)
        race = drawn.race({t.number: t.number for t in rivals}, Racing().error_rate)
        mine = world.table.scores[candidate.number][drawn.order][:, None]
        looks = (round(share * items) for share in ROUNDS[:-1])
        done = next((n for n in looks if race.beaten_by(mine[:n]) is not None), items)
        scored += done
        joins = not any(t.figures[SCORES[0].name] >= candidate.figures[SCORES[0].name] for t in rivals)
        open_ += joins
        wrong += done < items and joins
    print(f"{count:,} races, {open_:,} of candidates that beat all of their rivals, {wrong} of these were stopped")
    print(f"{scored / (count * items):.1%} of the items were scored")
    return [
        Result("racing_false_rejections", wrong / max(1, open_), 0.05, "lower"),
        Result("racing_item_saving", count * items / scored, 3.0, "higher"),
    ]


def overhead(world: World) -> list[Result]:
    """Of a proposal and its bookkeeping, at 100 and at 10,000 trials, in a space that is large enough."""
    return [
        Result(f"proposal_ms_at_{count}", _proposal_ms(count), limit, "lower")
        for count, limit in ((100, 20.0), (10_000, 100.0))
    ]


def _proposal_ms(count: int) -> float:
    """Median of 21 proposals, each with its trial's start and end, on a study in SQLite."""
    import tempfile

    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from winnow.build import instantiate
    from winnow.core.cli import CONF
    from winnow.search.forecaster import Forecasts
    from winnow.study.opening import open_study
    from winnow.study.policy import Suggestion, UniformDraw
    from winnow.study.space import read_space

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("search", overrides=["agent=portfolio"])
    space = read_space(OmegaConf.to_container(cfg.method, resolve=True), {})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    outlook = Forecasts(lambda strategies: [{"figures": {"size_bytes": 1e6 + len(s["methods"])}} for s in strategies])
    policy = instantiate(cfg.agent, "agent")
    times = []
    with tempfile.TemporaryDirectory() as folder:
        study = open_study("overhead", f"sqlite:///{folder}/study.db", OBJECTIVES, {})

        def once(suggestion: Any) -> None:
            proposal = study.reserve(suggestion, space)
            accuracy, latency = rng.random(2)
            figures = {
                "accuracy": accuracy,
                "size_bytes": 1e6 * rng.random(),
                "latency_ms": 100 + 100 * latency,
                "kl_to_base": rng.random(),
            }
            stages = [{"method": name, "seconds": 2.0, "reused": False} for name in suggestion.strategy.methods]
            seconds = {"evaluate": 10.0, "total": 12.0}
            trial = Trial(
                proposal.number,
                suggestion.strategy,
                figures=figures,
                stages=stages,
                seconds=seconds,
                decision=suggestion.record,
            )
            study.record(trial)
            outlook.observe(trial)

        once(Suggestion(Strategy(), "base"))
        while len(study.trials) < count:
            strategy = space.draw(UniformDraw(rng))
            if strategy.overrides not in study.proposed:
                once(Suggestion(strategy, "random"))
        for _ in range(22):
            started = time.perf_counter()
            once(policy.ask(study, space, outlook))
            times.append(1000 * (time.perf_counter() - started))
    print(f"{count:,} trials: {statistics.median(times[1:]):.1f} ms a proposal, the first of a start {times[0]:.0f} ms")
    return statistics.median(times[1:])


def parts(world: World, seeds: int) -> Iterator[tuple[str, Callable[[], list[Result]]]]:

    yield "racing", lambda: races(world)
    yield "overhead", lambda: overhead(world)
    yield "advisers", lambda: advisers(world, seeds)
    yield "cost", lambda: cost(world, seeds)


def main(arguments: Sequence[str]) -> None:
    settings = {"seeds": "50", "only": "racing,overhead,advisers,cost"} | dict(a.split("=", 1) for a in arguments)
    world = World()
    print(
        f"{len(world.table.rows)} strategies, {len(world.table.items):,} items; one after the other they took "
        f"{sum(map(full_cost, world.table.rows)) / 3600:.1f} h"
    )
    results = []
    for name, work in parts(world, int(settings["seeds"])):
        if name in settings["only"].split(","):
            results += work()
    report("search_efficiency", results)


if __name__ == "__main__":
    main(sys.argv[1:])
