"""Caches a model's outcomes on a benchmark, so that studies that score the base model on the same items do so once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.benchmark import figures, samples
from winnow.benchmark.harness import ROUNDS_FILE, Harness
from winnow.core.cache import Cache
from winnow.core.types import Figures
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served

logger = logging.getLogger(__name__)

FOLDER = "outcomes"
# fields of the benchmark that only choose the items
_ITEM_FIELDS = ("name", "limit", "data_dir", "holdout_share", "score_holdout", "order", "specs")


@dataclass(frozen=True)
class CachedBenchmark:
    """A benchmark whose outcomes for a model are computed once and cached.

    Attributes:
        cache: the root folder of the cache.
        cache_key: what decides the outcomes besides the benchmark and its items: the model, the machine, the code.
    """

    benchmark: Harness
    cache: Path
    cache_key: Mapping[str, Any]

    def scores(self) -> tuple[str, ...]:
        return self.benchmark.scores()

    def __call__(
        self,
        lm: LM,
        run: Run,
        watch: Callable[[Sequence[Any], int], None] | None = None,
        served: Served | None = None,
    ) -> Figures:
        """Scores `lm` as the benchmark does, or returns the cached figures; `watch` is not called for cached outcomes."""
        with quiet():
            questions, _ = self.benchmark.load_items()
        items = {name: [q.doc_hash for q in group] for name, group in questions.items()}
        settings = {k: v for k, v in dataclasses.asdict(self.benchmark).items() if k not in _ITEM_FIELDS}
        cache = Cache(self.cache / FOLDER)
        entry = cache.entry([dict(self.cache_key), settings, items])

        with cache.reading(entry, _load) as outcomes:
            if outcomes is not None:
                _copy(entry, run.folder)
                logger.info(
                    f"{self.benchmark.name}: the outcomes of {len(outcomes):,} items are known from an earlier study"
                )
                specs = self.benchmark.specs
                return figures.figures([(spec, [s for s in outcomes if s.benchmark == spec.name]) for spec in specs])
        measured = self.benchmark(lm, run, watch, served)
        # the run's folder has the outcomes even if another process stored the entry first, or the disk is full
        with contextlib.suppress(OSError), cache.writing(entry) as scratch:
            scratch.mkdir()
            _copy(run.folder, scratch)
        return measured


def _load(folder: Path) -> list[samples.Sample]:
    if not (folder / ROUNDS_FILE).is_file():
        raise ValueError(f"{folder} is incomplete")
    return samples.read(folder)


def _copy(source: Path, target: Path) -> None:
    for name in (samples.FILE, ROUNDS_FILE):
        shutil.copyfile(source / name, target / name)
