"""The probe of the `benchmark` group: scores a model through lm-eval, and keeps every item's outcome.

What a benchmark is stands in its YAML: the lm-eval task, the metric that counts, where its items lie. Greedy decoding, a
fixed batch size and items and exemplars that depend on the seed alone make a score repeatable on one machine.

    python evaluate.py benchmark=nano benchmark.limit=50
    python evaluate.py benchmark=five benchmark.data_dir=FOLDER
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from winnow.benchmark import figures, samples
from winnow.benchmark.spec import Spec
from winnow.hardware.runtime import serving
from winnow.types import LM, Figures, Run, UserError

PRELOAD = [
    "datasets",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "winnow.benchmark.adapter",
    "winnow.hardware.runtime.transformers",
]


@dataclass(frozen=True)
class Harness:
    """A set of benchmarks and how they are run.

    Attributes:
        name: the option's own name, `benchmark=<name>`.
        tasks: the benchmarks, by name; the keys of each are those of `winnow.benchmark.spec.Spec`.
        data_dir: a folder with the items as JSONL, laid out as each YAML says under `data`; None takes the hub's.
        limit: items of each benchmark, chosen by hash: those of a lower limit are among those of a higher one.
        num_fewshot: exemplars before each question; None leaves each benchmark's own number.
        batch_size: prompts at a time; keep it fixed, since it moves scores by rounding.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves each task's own.
        seed: of the choice of items and exemplars.
    """

    preload: ClassVar[tuple[str, ...]] = tuple(PRELOAD)

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    data_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 16
    max_gen_toks: int | None = None
    seed: int = 1234
    specs: tuple[Spec, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "max_gen_toks": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UserError(f"benchmark.{key}={value} is not a number of at least {low}")
        if not self.tasks:
            raise UserError("benchmark.tasks is empty; give at least one task")
        object.__setattr__(self, "specs", tuple(Spec.read(name, dict(values)) for name, values in self.tasks.items()))
        for spec in self.specs if self.data_dir is not None else ():
            assert self.data_dir is not None
            spec.check_files(self.data_dir)

    def scores(self) -> tuple[str, ...]:
        """The names of the figures in which more is better, one a benchmark and a further one where it has two."""
        scored = [spec for spec in self.specs if spec.metric is not None]
        return tuple(name for spec in scored for name in (spec.name, *(f"{spec.name}_{s}" for s in spec.also)))

    def __call__(self, lm: LM, run: Run) -> Figures:
        """Scores `lm`; writes `samples.parquet` into the run's folder.

        Raises:
            UserError: items are missing, or code cannot be run safely here.
        """
        from winnow.benchmark.score import score
        from winnow.benchmark.tasks import load

        scored = []
        with quiet(), serving(lm, log=run.log) as served:
            tasks = [load(spec, self.data_dir, self.num_fewshot) for spec in self.specs]  # all found before any is run
            adapter = served.scorer(self.batch_size, self.max_gen_toks)
            for spec, (main, also) in zip(self.specs, tasks, strict=True):
                started = time.perf_counter()
                found = score(adapter, spec, main, also, self.limit, self.seed)
                run.log(_line(spec, found, time.perf_counter() - started))
                scored.append((spec, found))
        samples.write([sample for _, found in scored for sample in found], run.folder / samples.FILE)
        return figures.figures(scored)


def _line(spec: Spec, found: list[samples.Sample], seconds: float) -> str:
    values = figures.figures([(spec, found)])
    if spec.metric is None:
        outcome = f"perplexity {values['perplexity']:.4g}, {values['bits_per_byte']:.3f} bits per byte"
    else:
        outcome = f"{values[spec.name]:.3f} ± {values[f'{spec.name}_stderr']:.3f}"
    return f"{spec.name}: {len(found)} items, {outcome}, {seconds:.1f} s"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of the libraries below; loggers, warnings and environment are afterwards as they were."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    environment = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for key in set(os.environ) - set(environment):
                del os.environ[key]
            os.environ.update(environment)
