"""Scores a model on the `benchmark` group's tasks through lm-eval, and stores the outcome of every item.

The YAML of a benchmark names the lm-eval task, the metric that counts, and the location of the items. Scores are repeatable on
one machine: decoding is greedy, the batch size is fixed, and items and exemplars depend on the seed alone.

    python evaluate.py benchmark=nano benchmark.limit=50
    python evaluate.py benchmark=five benchmark.data_dir=FOLDER
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.benchmark import figures, samples
from winnow.benchmark.adapters import scorer
from winnow.benchmark.order import Order, read_order
from winnow.core.errors import UserError
from winnow.core.hashes import sha256_of_files
from winnow.core.types import Figures
from winnow.data.task_spec import Spec
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served, serving

if TYPE_CHECKING:
    from winnow.benchmark.score import Question

logger = logging.getLogger(__name__)

Watch = Callable[[Sequence[samples.Sample], int], None]
ROUNDS_FILE = "rounds.json"  # for each round, by benchmark: [items, seconds]
SILENT_S = 3.0  # a longer round logs its progress
PRELOAD = [
    "datasets",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "winnow.benchmark.transformers_adapter",
    "winnow.runtime.transformers",
]


class EmptyHoldout(UserError):
    """A benchmark has so few items that none is left on one side of the hold-out."""


@dataclass(frozen=True)
class Harness:
    """A set of benchmarks and the settings that they are run with.

    Attributes:
        name: the name of the config option, `benchmark=<name>`.
        tasks: the benchmarks, by name; each has the keys of `winnow.data.task_spec.Spec`.
        data_dir: a folder with the items as JSONL, laid out as the `data` key of each YAML says; None uses the hub's items.
        limit: number of items of each benchmark, chosen by hash: a lower limit selects a subset of a higher one.
        num_fewshot: exemplars before each question; None leaves each benchmark's own number.
        batch_size: prompts at a time; keep it fixed, since it moves scores by rounding.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves each task's own.
        seed: the seed that chooses items and exemplars, and the order of the items.
        holdout_share: a share of the items that is left out, so that a search can confirm its results on it.
        score_holdout: whether only these held-out items are scored.
        rounds: shares of all items after which a race looks at the outcomes so far (`winnow.search.racing`). Scores are
            comparable only for equal rounds, which decide which prompts share a batch.
        order: a file of a search (`winnow.benchmark.order`) that puts some items early; None puts all in random order.
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
    holdout_share: float = 0.0
    score_holdout: bool = False
    rounds: Sequence[float] = (0.05, 0.15, 0.4, 1.0)
    order: str | None = None
    specs: tuple[Spec, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        minimums = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "max_gen_toks": 1}
        for key, minimum in minimums.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise UserError(f"benchmark.{key}={value} is not a number of at least {minimum}")
        if (
            list(self.rounds) != sorted(set(self.rounds))
            or not self.rounds
            or self.rounds[0] <= 0
            or self.rounds[-1] != 1
        ):
            raise UserError(f"benchmark.rounds={list(self.rounds)} does not rise to 1, such as [0.1,0.4,1.0]")
        if not 0 <= self.holdout_share < 1:
            raise UserError(f"benchmark.holdout_share={self.holdout_share} is not a share below 1; give e.g. 0.2")
        if not self.tasks:
            raise UserError("benchmark.tasks is empty; give at least one task")
        object.__setattr__(self, "specs", tuple(Spec.read(name, dict(values)) for name, values in self.tasks.items()))
        if self.order is not None:
            read_order(self.order)
        for spec in self.specs if self.data_dir is not None else ():
            assert self.data_dir is not None
            spec.check_files(self.data_dir)

    def scores(self) -> tuple[str, ...]:
        """Returns the names of the figures in which more is better: each benchmark's score and its further scores."""
        return tuple(name for spec in self.specs for name in spec.scores())

    def content(self) -> str | None:
        """Returns a hash of the files in `data_dir`; None for items that come with winnow or from the hub."""
        files = [path for spec in self.specs for path in spec.files(self.data_dir)]
        return sha256_of_files(files) if files else None

    def __call__(self, lm: LM, run: Run, watch: Watch | None = None, served: Served | None = None) -> Figures:
        """Scores `lm` in rounds, and writes `samples.parquet` and `rounds.json` into the run's folder.

        Args:
            watch: called after each round with all outcomes and the number of items to come; an exception from it ends the
                scoring.
            served: `lm` as a runtime has it open; None opens it.

        Raises:
            UserError: items are missing, or generated code cannot be run safely on this machine.
        """
        from winnow.benchmark.score import score

        outcomes: dict[str, list[samples.Sample]] = {spec.name: [] for spec in self.specs}
        seconds: dict[str, float] = dict.fromkeys(outcomes, 0.0)
        rounds: list[dict[str, Any]] = []
        with quiet(), serving(lm, served=served) as opened:
            items, extra_tasks = self.load_items()  # all of them before the first is scored
            adapter = scorer(opened, lm, self.batch_size, self.max_gen_toks)
            try:
                for chunk, remaining in self.schedule(items):
                    before = dict(seconds)
                    for spec in (spec for spec in self.specs if spec.name in chunk):
                        started = time.perf_counter()
                        outcomes[spec.name] += score(adapter, spec, chunk[spec.name], extra_tasks[spec.name], self.seed)
                        seconds[spec.name] += time.perf_counter() - started
                    rounds.append(
                        {name: [len(part), round(seconds[name] - before[name], 4)] for name, part in chunk.items()}
                    )
                    elapsed = sum(seconds.values()) - sum(before.values())
                    if remaining and elapsed > SILENT_S:
                        scored_count = sum(map(len, outcomes.values()))
                        logger.info(f"{scored_count:,} items are scored, {remaining:,} to go; {elapsed:.0f} s")
                    if watch is not None and remaining:
                        watch([sample for group in outcomes.values() for sample in group], remaining)
            finally:
                positions = {q.doc_hash: n for group in items.values() for n, q in enumerate(group)}
                scored = [
                    (spec, sorted(outcomes[spec.name], key=lambda s: positions[s.doc_hash])) for spec in self.specs
                ]
                samples.write([sample for _, group in scored for sample in group], run.folder / samples.FILE)
                (run.folder / ROUNDS_FILE).write_text(json.dumps(rounds) + "\n", encoding="utf-8")
        for spec, group in scored:
            logger.info(_summary_line(spec, group, seconds[spec.name]))
        return figures.figures(scored)

    def load_items(self) -> tuple[dict[str, list[Question]], dict[str, Any]]:
        """Returns the items to score, and the further tasks over them, by benchmark.

        Raises:
            UserError: items are missing.
        """
        from winnow.benchmark.score import questions
        from winnow.data.tasks import load

        loaded = {spec.name: load(spec, self.data_dir, self.num_fewshot) for spec in self.specs}
        selection = (self.limit, self.seed, self.holdout_share, self.score_holdout)
        items = {name: questions(main, *selection) for name, (main, _) in loaded.items()}
        empty = [name for name, group in items.items() if not group]
        if empty and self.holdout_share:
            purpose, option = ("to confirm on", "raise") if self.score_holdout else ("to search with", "lower")
            raise EmptyHoldout(
                f"benchmark {empty[0]} has so few items that none is left {purpose} where a share of {self.holdout_share:g} is "
                f"held back; {option} confirm, or set confirm=0"
            )
        if empty:
            raise UserError(f"benchmark {empty[0]} has no items")
        return items, {name: extra_tasks for name, (_, extra_tasks) in loaded.items()}

    def item_order(self) -> Order:
        """Returns the order in which items are scored."""
        return Order(self.seed) if self.order is None else read_order(self.order)

    def schedule(self, items: Mapping[str, Sequence[Question]]) -> Iterator[tuple[dict[str, list[Question]], int]]:
        """Yields the items of each round by benchmark, and the number of right-or-wrong items still to come; texts come last."""
        texts = {spec.name for spec in self.specs if spec.metric is None}
        order = self.item_order()
        queue = [(name, q) for name, group in items.items() if name not in texts for q in group]
        queue.sort(key=lambda pair: order.time((pair[0], pair[1].doc_hash)))
        ends = [round(share * len(queue)) for share in self.rounds]
        for start, end in itertools.pairwise([0, *ends]):
            chunk: dict[str, list[Question]] = defaultdict(list)
            for name, question in queue[start:end]:
                chunk[name].append(question)
            if chunk:
                yield dict(chunk), len(queue) - end
        if texts:
            yield {name: list(items[name]) for name in texts}, 0


def _summary_line(spec: Spec, outcomes: list[samples.Sample], seconds: float) -> str:
    values = figures.figures([(spec, outcomes)])
    if spec.metric is None:
        outcome = f"perplexity {values['perplexity']:.4g}, {values['bits_per_byte']:.3f} bits per byte"
    else:
        outcome = f"{values[spec.name]:.3f} ± {values[f'{spec.name}_stderr']:.3f}"
    return f"{spec.name}: {len(outcomes)} items, {outcome}, {seconds:.1f} s"
