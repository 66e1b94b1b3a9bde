"""What a strategy will take, in seconds, as far as the trials so far tell: its stages that nobody has applied yet, and the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from winnow.core.types import Strategy, Trial

Prefix = tuple[tuple[str, tuple[str, ...]], ...]
UNKNOWN_S = 1.0  # of a stage that was never seen: as good as free, so that it is tried


def prefixes(strategy: Strategy) -> Iterator[Prefix]:
    """The first stages with their knobs: one of them, two, and so on to all."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for method in strategy.methods:
        own = f"method.{method}."
        found.append((method, tuple(o for o in strategy.overrides if o.startswith(own))))
        yield tuple(found)


class Costs:
    """Means over trials: of each method's stage, and of evaluations that came to their end.

    Args:
        cached: whether what the first stages of a pipeline made is kept for others.
    """

    def __init__(self, cached: bool = True) -> None:
        self._cached = cached
        self._stages: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._evaluations = [0.0, 0]
        self._made: set[Prefix] = set()

    def observe(self, trial: Trial) -> None:
        for stage in trial.stages:
            if not stage["reused"]:
                _add(self._stages[stage["method"]], stage["seconds"])
        if self._cached:
            self._made.update(list(prefixes(trial.strategy))[: len(trial.stages)])
        if trial.complete:
            _add(self._evaluations, trial.seconds.get("evaluate", 0.0))

    def seconds(self, strategy: Strategy) -> float:
        """Expected: stages that an earlier trial has applied in the same way are taken from the stage cache."""
        known = list(prefixes(strategy))
        begun = max((n for n, prefix in enumerate(known, 1) if prefix in self._made), default=0)
        stages = sum(_mean(self._stages[method], UNKNOWN_S) for method in strategy.methods[begun:])
        return stages + _mean(self._evaluations, UNKNOWN_S)


def _add(total: list[float], value: float) -> None:
    total[0] += value
    total[1] += 1


def _mean(total: list[float], otherwise: float) -> float:
    return total[0] / total[1] if total[1] else otherwise
