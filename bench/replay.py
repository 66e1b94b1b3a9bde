"""A search over the table: what the search does with a trial, at the cost that it had when it was really run.

The policy, the history, the gates' decisions and the race are the search's own; only the trial itself is looked up.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from table import Row, Table

from winnow.build.job_settings import Racing
from winnow.core.errors import Reason
from winnow.core.types import Slot, Strategy, Trial
from winnow.search.early_stopping import LEAST_CHANCE, nearest_scored_trials
from winnow.search.folders import scored_divergences
from winnow.search.racing import Race, Rival
from winnow.study.costs import Costs, Prefix, prefixes
from winnow.study.history import History
from winnow.study.objectives import KL, KNOWN
from winnow.study.pareto import is_at_least_as_good
from winnow.study.policy import Exhausted, Policy, Suggestion

OBJECTIVES = tuple(KNOWN[name] for name in ("accuracy", "size_bytes", "latency_ms"))
SCORES, OTHERS = OBJECTIVES[:1], OBJECTIVES[1:]
ROUNDS = (0.05, 0.15, 0.4, 1.0)  # as conf/benchmark/nano.yaml has them, and as the table was made


@dataclass
class Looked:
    """What the table says of strategies before they run."""

    rows: Mapping[tuple[str, ...], Row]
    costs: Costs = field(default_factory=Costs)

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        return [self.rows[s.overrides].known if s.overrides in self.rows else {} for s in strategies]

    def infeasible_reason(self, strategy: Strategy) -> str:
        return "" if strategy.overrides in self.rows else "it cannot be made"

    def seconds(self, strategy: Strategy) -> float:
        return self.costs.seconds(strategy)

    def observe(self, trial: Trial) -> None:
        self.costs.observe(trial)


@dataclass
class Replay:
    """One search.

    Attributes:
        racing: the gates' settings; None runs every trial to its end, without looking at its divergence.
        cached: whether what the first stages of a pipeline made is kept.
        first: strategies before the policy is asked; the base model is always the very first.
        slots: of each method, by name.
        seed: of the orders in which items are put.
    """

    table: Table
    policy: Policy
    slots: Mapping[str, Slot]
    racing: Racing | None
    cached: bool = True
    first: tuple[Strategy, ...] = ()
    seconds: float = 0.0
    items: int = 0
    history: History = field(default_factory=lambda: History(OBJECTIVES))
    seed: int = 0
    _made: set[Prefix] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        known = {name for name, _ in self.table.items}
        self._texts = {name for put in self.table.rows[0].rounds for name in put} - known
        self.rows = {row.strategy.overrides: row for row in self.table.rows}
        self.numbers = {row.strategy.overrides: n for n, row in enumerate(self.table.rows)}
        self.outlook = Looked(self.rows)

    def run(self, space: Any) -> Iterator[Trial]:
        """Trials, each once it has ended and its cost is counted, until the space is exhausted."""
        for number in range(len(self.table.rows)):
            waiting = [s for s in (Strategy(), *self.first) if s.overrides not in self.history.proposed]
            try:
                found = (
                    Suggestion(waiting[0], "first") if waiting else self.policy.ask(self.history, space, self.outlook)
                )
            except Exhausted:
                return
            strategy = found.strategy
            self.history.begin(number, strategy, found.record)
            if refusal := self.outlook.infeasible_reason(strategy):
                trial = Trial(number, strategy, figures={}, reason=Reason.INFEASIBLE, message=refusal)
            else:
                trial = self.tried(number, strategy)
            # a portfolio learns from it
            trial = dataclasses.replace(trial, proposed_by=found.by, decision=found.record)
            self.history.end(trial)
            self.outlook.observe(trial)
            yield trial

    def tried(self, number: int, strategy: Strategy) -> Trial:
        row = self.rows[strategy.overrides]
        stages = self._compressed(row)
        self.seconds += row.seconds["load"] + overhead(row)
        figures = dict(row.figures)
        trial = Trial(number, strategy, figures=figures, stages=stages, seconds=row.seconds)
        rivals = [t for t in self.history.on_front if is_at_least_as_good(t, trial, OTHERS)]
        if self.racing is not None:
            self.seconds += row.seconds["divergence"]
        self.seconds += row.seconds["meters"]
        if self.racing is not None and self.racing.hopeless_ratio:
            for rival in rivals:
                bound = max(self.racing.hopeless_ratio * rival.figures[KL], self.racing.hopeless_floor)
                if figures[KL] > bound:
                    return self._stopped(trial, Reason.HOPELESS, {})
        return self._scored(trial, row, rivals)

    def _compressed(self, row: Row) -> list[dict[str, Any]]:
        """Adds the cost of the stages that are not in the cache; their records."""
        known = list(prefixes(row.strategy))
        begun = max((n for n, p in enumerate(known, 1) if p in self._made), default=0) if self.cached else 0
        records = [dict(stage, reused=n < begun) for n, stage in enumerate(row.stages)]
        paid = sum(stage["seconds"] for stage in row.stages if not stage["reused"])
        self.seconds += row.seconds["compress"] - paid + sum(s["seconds"] for s in records if not s["reused"])
        dense = [p for p in known if all(self.slots[name] < Slot.QUANTIZE for name, _ in p)]
        self._made.update(dense)
        return records

    def _scored(self, trial: Trial, row: Row, rivals: list[Trial]) -> Trial:
        if self.racing is None or not self.racing.error_rate or not rivals:
            self.seconds += sum(seconds for put in row.rounds for _, seconds in put.values())
            self.items += len(self.table.items)
            return trial
        at = {t.number: self.numbers[t.strategy.overrides] for t in self.history.trials if t.complete}
        alike = [
            at[number] for number in nearest_scored_trials(scored_divergences(self.history), trial.figures.get(KL))
        ]
        drawn = draw(self.table, [*alike, *(at[r.number] for r in rivals)], self._rng)
        race = drawn.race({r.number: at[r.number] for r in rivals}, self.racing.error_rate)
        mine = self.table.scores[self.numbers[trial.strategy.overrides]][drawn.order][:, None]
        begun = 0
        for share in ROUNDS:
            done = round(share * len(mine))
            self.seconds += round_seconds(row, Counter(self.table.items[n][0] for n in drawn.order[begun:done]))
            self.items += done - begun
            begun = done
            if done < len(mine) and (rival := race.beaten_by(mine[:done])) is not None:
                middle, _, _ = race.estimate(mine[:done], rival, 0)
                return self._stopped(trial, Reason.DOMINATED, {"accuracy": middle, "share_scored": share})
        self.seconds += sum(seconds for put in row.rounds for name, (_, seconds) in put.items() if name in self._texts)
        return trial

    def _stopped(self, trial: Trial, reason: Reason, estimates: dict[str, float]) -> Trial:
        kept = {name: trial.figures[name] for name in (KL, *(o.name for o in OTHERS))}
        return Trial(
            trial.number, trial.strategy, figures=kept, estimates=estimates, reason=reason, stages=trial.stages,
            seconds=trial.seconds,
        )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """Items in a drawn order."""

    table: Table
    order: np.ndarray
    chances: np.ndarray

    def race(self, rivals: Mapping[int, int], error_rate: float) -> Race:
        """Against rivals: their numbers, and their rows of the table."""
        made = [Rival(number, self.table.scores[row][self.order][:, None]) for number, row in rivals.items()]
        return Race(made, self.table.weights[self.order][:, None], self.chances[self.order], error_rate)


def draw(table: Table, informed_by: Sequence[int], rng: np.random.Generator) -> Drawn:
    """An order of the items as a trial draws it, informed by rows of the table."""
    chances = LEAST_CHANCE + (1 - table.scores[sorted(set(informed_by))]).mean(0)
    return Drawn(table, np.argsort(rng.exponential(size=len(chances)) / chances), chances)


def round_seconds(row: Row, items: Mapping[str, int]) -> float:
    """Of scoring so many items of each benchmark, interpolated between the rounds that the trial took."""
    seconds = 0.0
    for name, count in items.items():
        points = sorted((0, 0.0) if name not in put else tuple(put[name]) for put in row.rounds)
        counts, times = zip(*[(0, 0.0), *points], strict=True)
        seconds += float(np.interp(count, counts, times)) * max(1.0, count / counts[-1])
    return seconds


def overhead(row: Row) -> float:
    """Seconds of a trial that no part of it accounts for."""
    parts = sum(row.seconds[name] for name in ("load", "divergence", "meters", "benchmark"))
    return row.seconds["total"] - row.seconds["compress"] - parts


def full_cost(row: Row) -> float:
    """Seconds of a trial that is evaluated to its end with nothing kept from others, and no divergence looked at."""
    paid = sum(stage["seconds"] for stage in row.stages if not stage["reused"])
    return row.seconds["total"] - row.seconds["divergence"] - paid + sum(stage["seconds"] for stage in row.stages)


def front_points(table: Table) -> np.ndarray:
    """Objectives [strategies, objectives] of all strategies, less is better."""
    from winnow.study import pareto

    return pareto.points([Trial(n, r.strategy, figures=r.figures) for n, r in enumerate(table.rows)], OBJECTIVES)
