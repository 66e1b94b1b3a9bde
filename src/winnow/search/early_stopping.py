"""Early stopping: ends a trial during its evaluation, as cheaply as possible, once it cannot reach the front.

The *rivals* of a trial are the trials that were on the front when it began and are at least as good in everything but the scores.
A trial is *hopeless* if its predictions diverge much further from the base model's than those of a rival, and *dominated* if it
loses a race (`winnow.search.racing`) against its rivals. A trial without rivals is scored on all items, as is every trial that
reaches the front.

Items that similar trials answered wrongly come first, because an item that all of them answer correctly tells little.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.benchmark import divergence, order
from winnow.benchmark.cached import CachedBenchmark
from winnow.benchmark.harness import Harness
from winnow.benchmark.protocol import Benchmark
from winnow.benchmark.samples import FILE, Sample, read
from winnow.build.job_settings import TrialEvaluation
from winnow.core.errors import Reason, Stopped
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
from winnow.study.objectives import KL
from winnow.study.pareto import is_at_least_as_good

if TYPE_CHECKING:
    from winnow.runtime import Served

logger = logging.getLogger(__name__)

FROM_DISK = ("size_bytes",)  # hardware figures that need no meter
NEAREST_TRIALS = 16  # trials whose wrong answers decide which items come early
LEAST_CHANCE = 0.005  # chance of an item that all of them answered correctly; 1 + this if all were wrong
_KL_FLOOR = 1e-4  # nats per token: divergences below it count as equal


class EarlyStopping:
    """The early stopping of one trial.

    Args:
        folder: the folder of the trial, which holds `rivals.json`.
    """

    def __init__(self, trial: TrialEvaluation, folder: Path) -> None:
        self._trial, self._folder = trial, folder
        self._base: LM | None = None  # None where this trial is the base model itself
        self._benchmark: Harness = trial.evaluation.benchmark  # type: ignore[assignment]
        scores = self._benchmark.scores()
        self._score_objectives = [o for o in trial.objectives if o.name == "accuracy" or o.name in scores]
        self._other_objectives = [o for o in trial.objectives if o not in self._score_objectives]
        self._settings = trial.racing
        self._rivals: list[Mapping[str, Any]] = []
        self._race: racing.Race | None = None
        self._item_order = self._benchmark.item_order()
        self._cache: Path | None = None  # folder of the base model's cached outcomes
        self._cache_key: dict[str, Any] = {}
        # samples of an earlier trial, by trial number
        self._samples = functools.cache(lambda number: read(folder.parent / str(number) / FILE))
        self.scores_first = all(o.name in FROM_DISK for o in self._other_objectives)

    def on_loaded(self, lm: LM, served: Served, run: Run) -> Figures:
        """Returns the divergence from the base model and the size on disk."""
        figures = Figures({"size_bytes": float(disk_bytes(lm))})
        base = self._trial.base
        is_base = lm.manifest.get("stages", []) == base.manifest.get("stages", [])
        self._base = None if is_base else base
        if is_base and run.cache is not None and run.stage_cache_bytes:
            self._cache = run.cache
            self._cache_key = {
                "model": [base.sha256(), base.loading.dtype, base.loading.attention],
                "hardware": self._trial.evaluation.run.hardware.fingerprint(),
                "runtime": served.name,
                "versions": manifest.versions(),
                "code": code_sha256("benchmark", "data", "runtime", "hardware", "model", "nano"),
            }
        try:
            reference = divergence.reference(base, served if is_base else None, run, run.device)
            figures.merge(divergence.divergence(served, reference))
        except NotImplementedError as error:
            logger.info(f"no divergence from the base model: {error}")
        return figures

    def base(self) -> Base | None:
        """Returns the base model, to be measured in turn with this trial's; None for itself or without its figures."""
        base_figures = (self._snapshot["base"] or {}).get("figures", {})
        if self._base is None or not {"latency_ms", "peak_memory_bytes"} <= set(base_figures):
            return None
        figures = base_figures["latency_ms"], base_figures["peak_memory_bytes"]
        return Base(self._base, *figures, self._trial.memory_limit_bytes)

    @functools.cached_property
    def _snapshot(self) -> dict[str, Any]:
        path = self._folder / RIVALS
        nothing: dict[str, Any] = {"base": None, "front": [], "scored": {}}
        return nothing | (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def on_measured(self, figures: Figures) -> None:
        """Finds the rivals, and draws the item order of a race against them.

        Raises:
            Stopped: the trial is hopeless.
        """
        if any(o.name not in figures for o in self._other_objectives):
            return  # without all other figures nobody knows which trials are rivals
        snapshot = self._snapshot
        candidate = Trial(-1, Strategy(), figures=figures, sources=figures.sources)
        self._rivals = [
            rival
            for rival in snapshot["front"]
            if is_at_least_as_good(_trial_from_json(rival), candidate, self._other_objectives)
        ]
        settings = self._settings
        for rival in self._rivals if settings.hopeless_ratio and KL in figures else ():
            bound = max(settings.hopeless_ratio * rival["figures"].get(KL, np.inf), settings.hopeless_floor)
            if figures[KL] > bound:
                raise Stopped(
                    Reason.HOPELESS,
                    f"its divergence from the base model is {figures[KL]:.3g} nats a token, that of trial {rival['number']}, "
                    f"which is no worse in {_names(self._other_objectives)}, is {rival['figures'][KL]:.3g}",
                    {"share_scored": 0.0},
                )
        if self._rivals and settings.error_rate:
            self._draw_item_order({int(number): kl for number, kl in snapshot["scored"].items()}, figures.get(KL))

    def ordered(self, benchmark: Benchmark) -> Benchmark:
        """Returns the benchmark with the item order of this trial, or with cached outcomes for the base model."""
        if self._cache is not None:
            return CachedBenchmark(benchmark, self._cache, self._cache_key)  # type: ignore[arg-type]
        path = self._folder / order.FILE
        return dataclasses.replace(benchmark, order=str(path)) if path.is_file() else benchmark  # type: ignore[type-var]

    def _draw_item_order(self, scored: Mapping[int, float | None], kl: float | None) -> None:
        """Draws the item order and writes it to a file, which this trial and a later `evaluate.py` read.

        Args:
            scored: divergence of each trial that was scored on all items, by trial number.
            kl: divergence of this trial.
        """
        numbers = {*nearest_scored_trials(scored, kl), *(rival["number"] for rival in self._rivals)}
        missed: Counter[order.Item] = Counter()
        for number in numbers:
            for sample in self._samples(number):
                if sample.correct is not None:
                    missed[sample.benchmark, sample.doc_hash] += 1 - sample.score  # type: ignore[assignment]
        chances = {item: LEAST_CHANCE + times / len(numbers) for item, times in missed.items()}
        # each trial draws its own order: the outcome of an item must not depend on when the item comes
        self._item_order = order.Order(self._benchmark.seed + int(self._folder.name), chances)
        self._item_order.write(self._folder / order.FILE)

    def on_round(self, samples: Sequence[Sample], items_left: int) -> None:
        """Compares the outcomes so far with those of the rivals.

        Raises:
            Stopped: the trial is dominated.
        """
        if not self._rivals or not self._settings.error_rate:
            return
        if self._race is None:
            self._race = self._start_race()
        scored_samples = self._sort_scored(samples)
        scores = score_matrix(scored_samples, self._score_objectives)
        rival = self._race.beaten_by(scores)
        if rival is None:
            return
        estimates = {"share_scored": len(scores) / len(self._race.weights)}
        for column, objective in enumerate(self._score_objectives):
            name = objective.name
            middle, low, high = self._race.estimate(scores, rival, column)
            estimates |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        raise Stopped(
            Reason.DOMINATED,
            f"after {len(scores):,} of {len(self._race.weights):,} items trial {rival.number}, which is no worse in "
            f"{_names(self._other_objectives)}, is at least as good in {_names(self._score_objectives)}",
            estimates,
        )

    def _start_race(self) -> racing.Race:
        samples_by_rival = [self._sort_scored(self._samples(rival["number"])) for rival in self._rivals]
        pairs = zip(self._rivals, samples_by_rival, strict=True)
        rivals = [
            racing.Rival(rival["number"], score_matrix(samples, self._score_objectives)) for rival, samples in pairs
        ]
        weights = weights_of(samples_by_rival[0], self._benchmark.specs, self._score_objectives)
        chances = np.array([self._item_order.chance((s.benchmark, s.doc_hash)) for s in samples_by_rival[0]])
        return racing.Race(rivals, weights, chances, self._settings.error_rate)

    def _sort_scored(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns the samples that are right or wrong, in item order."""
        scored = [s for s in samples if s.correct is not None]
        return sorted(scored, key=lambda s: self._item_order.time((s.benchmark, s.doc_hash)))


def nearest_scored_trials(scored: Mapping[int, float | None], kl: float | None) -> list[int]:
    """Returns the numbers of the scored trials whose divergence is nearest to `kl`, nearest first."""

    def distance(number: int) -> float:
        other_kl = scored[number]
        if other_kl is None or kl is None:
            return math.inf
        return abs(math.log((other_kl + _KL_FLOOR) / (kl + _KL_FLOOR)))

    return sorted(scored, key=distance)[:NEAREST_TRIALS]


def _trial_from_json(record: Mapping[str, Any]) -> Trial:
    """Returns a trial from its record in `rivals.json`."""
    return Trial(record["number"], Strategy(), figures=record["figures"], sources=record["sources"])


def weights_of(samples: Sequence[Sample], specs: Sequence[Spec], scores: Sequence[Objective]) -> np.ndarray:
    """Returns the weight [items, scores] of each item in each score."""
    means = {spec.name: spec.mean for spec in specs if spec.metric is not None}
    items = Counter(s.benchmark for s in samples)
    parts = Counter((s.benchmark, s.subtask) for s in samples)
    subtasks = Counter(benchmark for benchmark, _ in parts)
    weights = np.zeros((len(samples), len(scores)))
    for row, sample in enumerate(samples):
        name = sample.benchmark
        share = 1 / items[name] if means[name] == "items" else 1 / parts[name, sample.subtask] / subtasks[name]
        for column, objective in enumerate(scores):
            if objective.name == "accuracy":
                weights[row, column] = share / len(items)
            elif objective.name == name or objective.name.startswith(f"{name}_"):
                weights[row, column] = share
    return weights


def score_matrix(samples: Sequence[Sample], scores: Sequence[Objective]) -> np.ndarray:
    """Returns the outcome [items, scores] of each item, 0 where it does not count for a score."""
    outcomes = np.zeros((len(samples), len(scores)))
    for row, sample in enumerate(samples):
        for column, objective in enumerate(scores):
            suffix = objective.name.removeprefix(f"{sample.benchmark}_")
            if objective.name in ("accuracy", sample.benchmark):
                outcomes[row, column] = sample.score
            elif suffix != objective.name and suffix in sample.extra:
                outcomes[row, column] = float(sample.extra[suffix])
    return outcomes


def _names(objective_list: Sequence[Objective]) -> str:
    return ", ".join(o.name for o in objective_list) or "anything else"
