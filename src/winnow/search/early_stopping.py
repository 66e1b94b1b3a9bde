"""What a trial meets on its way through an evaluation, from cheap to dear; it is stopped where it cannot reach the front.

Its *rivals* are the trials that were on the front when it began and are at least as good in everything but the scores. It is
*hopeless* if its predictions are much further from the base model's than a rival's, and *dominated* if it loses a race
(`winnow.search.racing`) against them. Without rivals it is scored on all items, as is whatever reaches the front.

Items come early that trials like it got wrong: where all of them are right, there is little to see.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from winnow import build
from winnow.benchmark import divergence, order
from winnow.benchmark.cached import CachedBenchmark
from winnow.benchmark.harness import Harness
from winnow.benchmark.protocol import Benchmark
from winnow.benchmark.samples import FILE, Sample, read
from winnow.core.errors import Reason, Stopped, UserError
from winnow.core.types import Figures, Objective, Strategy, Trial
from winnow.data.task_spec import Spec
from winnow.hardware.footprint import disk_bytes
from winnow.hardware.run import Run
from winnow.method.prefixes import code_sha256
from winnow.model import manifest
from winnow.model.lm import LM
from winnow.runtime.in_turn import Base
from winnow.search import racing
from winnow.search.job import RIVALS
from winnow.study.objectives import KL, objectives
from winnow.study.pareto import is_at_least_as_good

if TYPE_CHECKING:
    from winnow.runtime import Served

FROM_DISK = ("size_bytes",)  # hardware figures that no meter is needed for
ALIKE = 16  # trials that say which items matter
LEAST_CHANCE = 0.005  # of an item that none of them got wrong; 1 of one that all did
_KL_FLOOR = 1e-4  # nats a token: below it two divergences are alike


@dataclass(frozen=True)
class Racing:
    """When a trial is stopped early.

    Attributes:
        error_rate: of stopping one that no rival matches, over its whole race; 0 never races.
        hopeless_ratio: of its divergence from the base model to that of a rival; 0 never stops for it.
        hopeless_floor: in nats a token; below it nothing is hopeless.
    """

    error_rate: float = 0.05
    hopeless_ratio: float = 4.0
    hopeless_floor: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 1:
            raise UserError(f"racing.error_rate={self.error_rate} is not a share; give 0.05, or 0 to score every item")
        for name in ("hopeless_ratio", "hopeless_floor"):
            if getattr(self, name) < 0:
                raise UserError(f"racing.{name}={getattr(self, name)} is negative; give 0 to switch it off")


class EarlyStopping:
    """The gates of one trial.

    Args:
        config: of the trial; `model` is the base model.
        folder: of the trial, in which `rivals.json` lies.
    """

    def __init__(self, config: DictConfig, folder: Path, log: Callable[[str], None]) -> None:
        self._config, self._folder, self._log = config, folder, log
        self._base: LM | None = None  # where it is not the model of this trial
        self._benchmark: Harness = build.benchmark(config)  # type: ignore[assignment]
        scores = self._benchmark.scores()
        found = objectives(list(config.objectives), scores)
        self._scores = [o for o in found if o.name == "accuracy" or o.name in scores]
        self._others = [o for o in found if o not in self._scores]
        self._settings = Racing(**config.racing)
        self._rivals: list[Mapping[str, Any]] = []
        self._race: racing.Race | None = None
        self._drawn = self._benchmark.drawn()
        self._cache: Path | None = None  # of the base model's outcomes
        self._about: dict[str, Any] = {}
        self._samples = functools.cache(lambda number: read(folder.parent / str(number) / FILE))  # of an earlier trial
        self.scores_first = all(o.name in FROM_DISK for o in self._others)

    def on_loaded(self, lm: LM, served: Served, run: Run) -> Figures:
        """The divergence from the base model, and the size on disk."""
        figures = Figures({"size_bytes": float(disk_bytes(lm))})
        base = build.model(self._config)
        is_base = lm.manifest.get("stages", []) == base.manifest.get("stages", [])
        self._base = None if is_base else base
        if is_base and run.cache is not None and run.stage_cache_bytes:
            self._cache = run.cache
            self._about = {
                "model": [base.sha256(), base.loading.dtype, base.loading.attention],
                "hardware": build.hardware(self._config).fingerprint(),
                "runtime": served.name,
                "versions": manifest.versions(),
                "code": code_sha256("benchmark", "data", "runtime", "hardware", "model", "nano"),
            }
        try:
            wanted = divergence.reference(base, served if is_base else None, run, run.device)
            figures.merge(divergence.divergence(served, wanted))
        except NotImplementedError as error:
            self._log(f"no divergence from the base model: {error}")
        return figures

    def base(self) -> Base | None:
        """The base model, to measure this trial's in turn with; None where it is the same one, or its trial has no figures."""
        found = (self._told["base"] or {}).get("figures", {})
        if self._base is None or not {"latency_ms", "peak_memory_bytes"} <= set(found):
            return None
        limit = self._config.limits.memory_bytes
        return Base(self._base, found["latency_ms"], found["peak_memory_bytes"], limit)

    @functools.cached_property
    def _told(self) -> dict[str, Any]:
        path = self._folder / RIVALS
        nothing: dict[str, Any] = {"base": None, "front": [], "scored": {}}
        return nothing | (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def on_measured(self, figures: Figures) -> None:
        """Finds the rivals.

        Raises:
            Stopped: hopeless.
        """
        if any(o.name not in figures for o in self._others):
            return  # text is scored last: whether it is matched there is not known before the end
        told = self._told
        mine = Trial(-1, Strategy(), figures=figures, sources=figures.sources)
        self._rivals = [rival for rival in told["front"] if is_at_least_as_good(_trial(rival), mine, self._others)]
        settings = self._settings
        for rival in self._rivals if settings.hopeless_ratio and KL in figures else ():
            bound = max(settings.hopeless_ratio * rival["figures"].get(KL, np.inf), settings.hopeless_floor)
            if figures[KL] > bound:
                raise Stopped(
                    Reason.HOPELESS,
                    f"its divergence from the base model is {figures[KL]:.3g} nats a token, that of trial {rival['number']}, "
                    f"which is no worse in {_names(self._others)}, is {rival['figures'][KL]:.3g}",
                    {"share_scored": 0.0},
                )
        if self._rivals and settings.error_rate:
            self._draw({int(number): kl for number, kl in told["scored"].items()}, figures.get(KL))

    def ordered(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark, its items in the order that was drawn for this trial; the base model's outcomes may be known."""
        if self._cache is not None:
            return CachedBenchmark(benchmark, self._cache, self._about)  # type: ignore[arg-type]
        path = self._folder / order.FILE
        return dataclasses.replace(benchmark, order=str(path)) if path.is_file() else benchmark  # type: ignore[type-var]

    def _draw(self, scored: Mapping[int, float | None], kl: float | None) -> None:
        """Draws the order, and writes it down: `evaluate.py` takes it from there, and so does this trial itself.

        Args:
            scored: divergences of trials that were scored on all items, by number.
            kl: its own.
        """
        numbers = {*nearest_scored_trials(scored, kl), *(rival["number"] for rival in self._rivals)}
        missed: Counter[order.Item] = Counter()
        for number in numbers:
            for sample in self._samples(number):
                if sample.correct is not None:
                    missed[sample.benchmark, sample.doc_hash] += 1 - sample.score  # type: ignore[assignment]
        chances = {item: LEAST_CHANCE + times / len(numbers) for item, times in missed.items()}
        # drawn anew for each trial: what others are told of an item must not depend on when it comes
        self._drawn = order.Order(self._benchmark.seed + int(self._folder.name), chances)
        self._drawn.write(self._folder / order.FILE)

    def on_round(self, samples: Sequence[Sample], left: int) -> None:
        """Looks at the race.

        Raises:
            Stopped: dominated.
        """
        if not self._rivals or not self._settings.error_rate:
            return
        if self._race is None:
            self._race = self._started()
        found = self._in_order(samples)
        scores = table(found, self._scores)
        rival = self._race.beaten_by(scores)
        if rival is None:
            return
        estimates = {"share_scored": len(scores) / len(self._race.weights)}
        for column, objective in enumerate(self._scores):
            name = objective.name
            middle, low, high = self._race.estimate(scores, rival, column)
            estimates |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        raise Stopped(
            Reason.DOMINATED,
            f"after {len(scores):,} of {len(self._race.weights):,} items trial {rival.number}, which is no worse in "
            f"{_names(self._others)}, is at least as good in {_names(self._scores)}",
            estimates,
        )

    def _started(self) -> racing.Race:
        found = [self._in_order(self._samples(rival["number"])) for rival in self._rivals]
        numbered = zip(self._rivals, found, strict=True)
        rivals = [racing.Rival(rival["number"], table(samples, self._scores)) for rival, samples in numbered]
        weights = weights_of(found[0], self._benchmark.specs, self._scores)
        chances = np.array([self._drawn.chance((s.benchmark, s.doc_hash)) for s in found[0]])
        return racing.Race(rivals, weights, chances, self._settings.error_rate)

    def _in_order(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that are right or wrong, in the order in which items are put."""
        scored = [s for s in samples if s.correct is not None]
        return sorted(scored, key=lambda s: self._drawn.time((s.benchmark, s.doc_hash)))


def nearest_scored_trials(scored: Mapping[int, float | None], kl: float | None) -> list[int]:
    """The trials, of those with these divergences, that are most like one with the divergence `kl`."""

    def distance(number: int) -> float:
        theirs = scored[number]
        if theirs is None or kl is None:
            return math.inf
        return abs(math.log((theirs + _KL_FLOOR) / (kl + _KL_FLOOR)))

    return sorted(scored, key=distance)[:ALIKE]


def _trial(told: Mapping[str, Any]) -> Trial:
    """A trial of the front as `rivals.json` has it."""
    return Trial(told["number"], Strategy(), figures=told["figures"], sources=told["sources"])


def weights_of(samples: Sequence[Sample], specs: Sequence[Spec], scores: Sequence[Objective]) -> np.ndarray:
    """The share [items, scores] that each item has in each score."""
    means = {spec.name: spec.mean for spec in specs if spec.metric is not None}
    items = Counter(s.benchmark for s in samples)
    parts = Counter((s.benchmark, s.subtask) for s in samples)
    subtasks = Counter(benchmark for benchmark, _ in parts)
    found = np.zeros((len(samples), len(scores)))
    for row, sample in enumerate(samples):
        name = sample.benchmark
        share = 1 / items[name] if means[name] == "items" else 1 / parts[name, sample.subtask] / subtasks[name]
        for column, objective in enumerate(scores):
            if objective.name == "accuracy":
                found[row, column] = share / len(items)
            elif objective.name == name or objective.name.startswith(f"{name}_"):
                found[row, column] = share
    return found


def table(samples: Sequence[Sample], scores: Sequence[Objective]) -> np.ndarray:
    """The outcome [items, scores] of each item, 0 where it does not count for a score."""
    found = np.zeros((len(samples), len(scores)))
    for row, sample in enumerate(samples):
        for column, objective in enumerate(scores):
            suffix = objective.name.removeprefix(f"{sample.benchmark}_")
            if objective.name in ("accuracy", sample.benchmark):
                found[row, column] = sample.score
            elif suffix != objective.name and suffix in sample.extra:
                found[row, column] = float(sample.extra[suffix])
    return found


def _names(found: Sequence[Objective]) -> str:
    return ", ".join(o.name for o in found) or "anything else"
