"""A search over the table: what the search does with a trial, at the cost that it had when it was really run.

The policy, the history, the gates' decisions and the race are the search's own; only the trial itself is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from table import Row, Table

from winnow.agent.policy import Exhausted, Policy
from winnow.search.costs import Costs, Prefix, prefixes
from winnow.search.gates import KL, Racing, matches
from winnow.search.history import History
from winnow.search.objectives import KNOWN
from winnow.search.racing import Race, Rival
from winnow.types import Reason, Slot, Strategy, Trial

OBJECTIVES = tuple(KNOWN[name] for name in ("accuracy", "size_bytes", "latency_ms"))
SCORES, OTHERS = OBJECTIVES[:1], OBJECTIVES[1:]


@dataclass
class Looked:
    """What the table says of strategies before they run."""

    rows: Mapping[tuple[str, ...], Row]
    costs: Costs = field(default_factory=Costs)

    def figures(self, strategy: Strategy) -> Mapping[str, float]:
        row = self.rows.get(strategy.overrides)
        return row.known if row is not None else {}

    def refusal(self, strategy: Strategy) -> str:
        return "" if strategy.overrides in self.rows else "it is not in the table"

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
    _made: set[Prefix] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rows = {row.strategy.overrides: row for row in self.table.rows}
        self.numbers = {row.strategy.overrides: n for n, row in enumerate(self.table.rows)}
        self.outlook = Looked(self.rows)

    def run(self, space: Any) -> Iterator[Trial]:
        """Trials, each once it has ended and its cost is counted, until the space is exhausted."""
        for number in range(len(self.table.rows)):
            waiting = [s for s in (Strategy(), *self.first) if s.overrides not in self.history.seen]
            try:
                strategy = waiting[0] if waiting else self.policy.ask(self.history, space, self.outlook).strategy
            except Exhausted:
                return
            self.history.begin(number, strategy)
            trial = self.tried(number, strategy)
            self.history.end(trial)
            self.outlook.observe(trial)
            yield trial

    def tried(self, number: int, strategy: Strategy) -> Trial:
        row = self.rows[strategy.overrides]
        stages = self._compressed(row)
        self.seconds += row.seconds["load"] + overhead(row)
        figures = dict(row.figures)
        trial = Trial(number, strategy, figures=figures, stages=stages, seconds=row.seconds)
        rivals = [t for t in self.history.on_front if matches(t.figures, figures, OTHERS)]
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
        mine = self.table.scores[self.numbers[trial.strategy.overrides]]
        racing = self.racing is not None and self.racing.error_rate > 0 and bool(rivals)
        if racing:
            assert self.racing is not None
            scores = [self.table.scores[self.numbers[r.strategy.overrides]] for r in rivals]
            found = [Rival(r.number, s[:, None]) for r, s in zip(rivals, scores, strict=True)]
            race = Race(found, self.table.weights[:, None], self.racing.error_rate)
        done = 0
        for put in row.rounds:
            self.seconds += sum(seconds for _, seconds in put.values())
            if done < len(mine):
                done += sum(items for items, _ in put.values())
                self.items += sum(items for items, _ in put.values())
                if racing and done < len(mine) and race.beaten_by(mine[:done, None]) is not None:
                    weights = self.table.weights[:done]
                    estimate = float((weights * mine[:done]).sum() / weights.sum())
                    return self._stopped(
                        trial, Reason.DOMINATED, {"accuracy": estimate, "share_scored": done / len(mine)}
                    )
        return trial

    def _stopped(self, trial: Trial, reason: Reason, estimates: dict[str, float]) -> Trial:
        kept = {name: trial.figures[name] for name in (KL, *(o.name for o in OTHERS))}
        return Trial(
            trial.number, trial.strategy, figures=kept, estimates=estimates, reason=reason, stages=trial.stages,
            seconds=trial.seconds,
        )  # fmt: skip


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
    from winnow.search import pareto

    return pareto.points([Trial(n, r.strategy, figures=r.figures) for n, r in enumerate(table.rows)], OBJECTIVES)
