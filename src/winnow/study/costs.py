"""Estimates the duration of a strategy from the trials so far: its stages that are not cached yet, and its evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from winnow.core.types import Strategy, Trial

Prefix = tuple[tuple[str, tuple[str, ...]], ...]
UNKNOWN_S = 1.0  # duration of a stage that was never run: nearly free, so that it is tried


def prefixes(strategy: Strategy) -> Iterator[Prefix]:
    """Yields the first stages with their knobs: one stage, two stages, and so on to all."""
    stages: list[tuple[str, tuple[str, ...]]] = []
    for method in strategy.methods:
        own = f"method.{method}."
        stages.append((method, tuple(o for o in strategy.overrides if o.startswith(own))))
        yield tuple(stages)


class Costs:
    """Mean durations over trials: of each method's stage, and of finished evaluations.

    Args:
        cached: True if the results of the first stages of a pipeline are cached for other pipelines.
    """

    def __init__(self, cached: bool = True) -> None:
        self._cached = cached
        self._stages: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._evaluations = [0.0, 0]
        self._cached_prefixes: set[Prefix] = set()

    def observe(self, trial: Trial) -> None:
        for stage in trial.stages:
            if not stage["reused"]:
                _add(self._stages[stage["method"]], stage["seconds"])
        if self._cached:
            self._cached_prefixes.update(list(prefixes(trial.strategy))[: len(trial.stages)])
        if trial.complete:
            _add(self._evaluations, trial.seconds.get("evaluate", 0.0))

    def seconds(self, strategy: Strategy) -> float:
        """Returns the expected duration; stages that an earlier trial has applied in the same way come from the stage cache."""
        numbered = enumerate(prefixes(strategy), 1)
        cached_stages = max((n for n, prefix in numbered if prefix in self._cached_prefixes), default=0)
        stages = sum(_mean(self._stages[method], UNKNOWN_S) for method in strategy.methods[cached_stages:])
        return stages + _mean(self._evaluations, UNKNOWN_S)


def _add(total: list[float], value: float) -> None:
    total[0] += value
    total[1] += 1


def _mean(total: list[float], default: float) -> float:
    return total[0] / total[1] if total[1] else default
