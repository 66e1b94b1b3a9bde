"""The portfolio with scripted advisers in the place of a language model: bad ones must cost little, a good one must pay."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Result, spread
from replay import OBJECTIVES
from searches import SHARE, World, at, ours, reached

from winnow.agent.gp import GP
from winnow.agent.portfolio import Portfolio
from winnow.build.job_settings import Racing
from winnow.core.types import Trial
from winnow.study import pareto
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Suggestion, untried_strategies
from winnow.study.space import Space

SHARE_OF_LLM = 0.3
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of what the optimizer alone needs for 99 %


@dataclass(frozen=True)
class Ranked:
    """An adviser that proposes the first strategy of a list that was not tried."""

    strategies: tuple[Any, ...]

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        for strategy in self.strategies:
            if strategy.overrides not in history.proposed:
                return Suggestion(strategy, "adviser", "as told")
        raise Exhausted("the adviser has nothing more to say")


@dataclass(frozen=True)
class Knowing:
    """An adviser that knows the exhaustive front, and sees what was found, as a brief shows it: what adds most to that."""

    world: World
    front: tuple[int, ...]

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        found = [self.world.numbers[t.strategy.overrides] for t in history.trials if t.complete]
        strategies = {n: self.world.table.rows[n].strategy for n in self.front}
        left = [n for n, strategy in strategies.items() if strategy.overrides not in history.proposed]
        if not left:
            raise Exhausted("the adviser has nothing more to say")
        most = max(left, key=lambda n: self.world.share([*found, n]))
        return Suggestion(strategies[most], "adviser", "it adds most to what was found")


@dataclass(frozen=True)
class Nonsense:
    """An adviser whose answers are strategies of no sense: drawn blindly."""

    seed: int

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        rng = np.random.default_rng([self.seed, history.proposals, 7])
        candidates = untried_strategies(history, space, rng, 16)
        return Suggestion(candidates[int(rng.integers(len(candidates)))], "adviser", "nonsense")


@dataclass(frozen=True)
class Garbage:
    """An adviser that never gives a usable answer: the language model's policy then passes on what the optimizer would do."""

    optimizer: Any

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        found: Suggestion = self.optimizer.ask(history, space, outlook)
        return found


def advisers(world: World, seeds: int) -> list[Result]:
    """`portfolio_bad_adviser`: the least share, over budgets and bad advisers, of the optimizer's hypervolume, medians over seeds;
    `portfolio_good_adviser`: cost to 99 % with one that knows the front, relative to the optimizer's alone. (One that names the
    same strategies in an order of its own, whatever was found, is printed, too.)"""
    trials = [Trial(n, row.strategy, figures=row.figures) for n, row in enumerate(world.table.rows)]
    front = tuple(pareto.front(trials, OBJECTIVES))
    depth = np.array([world.share([n]) for n in range(len(trials))])  # what each adds by itself
    best = tuple(trials[n].strategy for n in sorted(front, key=lambda n: -depth[n]))
    worst = tuple(trials[n].strategy for n in np.argsort(depth) if n not in front)
    makers = {
        "garbage": lambda seed: Garbage(GP(seed)),
        "nonsense": Nonsense,
        "worst": lambda seed: Ranked(worst),
        "good": lambda seed: Knowing(world, front),
        "ordered": lambda seed: Ranked(best),
    }
    cost = statistics.median(spread(lambda seed: reached(ours(world, GP(seed), Racing(), True, seed)), range(seeds)))
    alone = spread(lambda seed: ours(world, GP(seed), Racing(), True, seed, until=1.0, budget=cost), range(seeds))
    found = {}
    for name, make in makers.items():

        def advised(seed: int, name: str = name, make: Any = make) -> Any:
            agents = {"llm": make(seed), "gp": GP(seed)}
            policy = Portfolio(agents, {"llm": SHARE_OF_LLM, "gp": 1 - SHARE_OF_LLM}, seed)
            if name in ("good", "ordered"):
                return ours(world, policy, Racing(), True, seed)
            return ours(world, policy, Racing(), True, seed, until=1.0, budget=cost)

        found[name] = spread(advised, range(seeds))
    least = 1.0
    for name in ("garbage", "nonsense", "worst"):
        for budget in BUDGETS:
            mine = statistics.median(at(curve, budget * cost) for curve in found[name])
            theirs = statistics.median(at(curve, budget * cost) for curve in alone)
            least = min(least, mine / theirs)
            print(
                f"adviser {name:<9} {budget:4.0%} of the cost: {mine:.4f} of the hypervolume, the optimizer alone {theirs:.4f}"
            )
    good, ordered = (statistics.median(map(reached, found[name])) for name in ("good", "ordered"))
    print(
        f"adviser that knows the front: {good:,.0f} s to {SHARE:.0%}, one that names it in its own order {ordered:,.0f} s, "
        f"the optimizer alone {cost:,.0f} s"
    )
    return [
        Result("portfolio_bad_adviser", least, 0.95, "higher"),
        Result("portfolio_good_adviser", good / cost, 0.5, "lower"),
    ]
