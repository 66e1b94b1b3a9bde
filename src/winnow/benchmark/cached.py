"""What a model made of a benchmark's items, kept: studies that ask the base model the same items score it once."""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.benchmark import figures, samples
from winnow.benchmark.harness import ROUNDS_FILE, Harness
from winnow.core.types import Figures
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served

FOLDER = "outcomes"
_CHOOSING = ("name", "limit", "data_dir", "held_back", "confirming", "order", "specs")  # which items, and no more


@dataclass(frozen=True)
class CachedBenchmark:
    """A benchmark that is put to a model once.

    Attributes:
        cache: the folder of all that is kept.
        about: what decides the outcomes beside the benchmark and its items: the model, the machine, the code.
    """

    benchmark: Harness
    cache: Path
    about: Mapping[str, Any]

    def scores(self) -> tuple[str, ...]:
        return self.benchmark.scores()

    def __call__(
        self,
        lm: LM,
        run: Run,
        watch: Callable[[Sequence[Any], int], None] | None = None,
        served: Served | None = None,
    ) -> Figures:
        """As the benchmark's own; `watch` is not asked about what is known."""
        from winnow.benchmark.score import digest

        with quiet():
            asked, _ = self.benchmark.asked()
        items = {name: [q.doc_hash for q in of_one] for name, of_one in asked.items()}
        how = {k: v for k, v in dataclasses.asdict(self.benchmark).items() if k not in _CHOOSING}
        kept = self.cache / FOLDER / digest(dict(self.about), how, items)[:32]
        if not (kept / samples.FILE).is_file():
            found = self.benchmark(lm, run, watch, served)
            self._keep(run.folder, kept)
            return found
        for name in (samples.FILE, ROUNDS_FILE):
            shutil.copyfile(kept / name, run.folder / name)
        known = samples.read(kept)
        run.log(f"{self.benchmark.name}: the outcomes of {len(known):,} items are known from an earlier study")
        specs = self.benchmark.specs
        return figures.figures([(spec, [s for s in known if s.benchmark == spec.name]) for spec in specs])

    def _keep(self, folder: Path, kept: Path) -> None:
        partial = kept.with_name(f".{kept.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            partial.mkdir(parents=True)
            for name in (samples.FILE, ROUNDS_FILE):
                shutil.copyfile(folder / name, partial / name)
            partial.rename(kept)
        except (
            OSError
        ):  # another process was faster, or the disk is full: the outcomes are in the run's folder all the same
            shutil.rmtree(partial, ignore_errors=True)
