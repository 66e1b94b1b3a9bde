"""The probe of the `benchmark` group: scores a model through lm-eval, and keeps every item's outcome.

What a benchmark is stands in its YAML: the lm-eval task, the metric that counts, where its items lie. Greedy decoding, a
fixed batch size and items and exemplars that depend on the seed alone make a score repeatable on one machine.

    python evaluate.py benchmark=nano benchmark.limit=50
    python evaluate.py benchmark=five benchmark.data_dir=FOLDER
"""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.benchmark import figures, samples
from winnow.benchmark.adapters import scorer
from winnow.benchmark.order import Order, read
from winnow.core.errors import UserError
from winnow.core.files import sha256_of
from winnow.core.types import Figures
from winnow.data.task_spec import Spec
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served, serving

if TYPE_CHECKING:
    from winnow.benchmark.score import Question

Watch = Callable[[Sequence[samples.Sample], int], None]
ROUNDS_FILE = "rounds.json"  # of each round, and by benchmark: items and seconds
SILENT_S = 3.0  # a round that takes longer says so
PRELOAD = [
    "datasets",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "winnow.benchmark.transformers_adapter",
    "winnow.runtime.transformers",
]


@dataclass(frozen=True)
class Harness:
    """A set of benchmarks and how they are run.

    Attributes:
        name: the option's own name, `benchmark=<name>`.
        tasks: the benchmarks, by name; the keys of each are those of `winnow.data.task_spec.Spec`.
        data_dir: a folder with the items as JSONL, laid out as each YAML says under `data`; None takes the hub's.
        limit: items of each benchmark, chosen by hash: those of a lower limit are among those of a higher one.
        num_fewshot: exemplars before each question; None leaves each benchmark's own number.
        batch_size: prompts at a time; keep it fixed, since it moves scores by rounding.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves each task's own.
        seed: of the choice of items and exemplars, and of the order in which items are put.
        held_back: a share of the items that is left out, for a search to confirm what it found on.
        confirming: whether just these are scored.
        rounds: shares of all items after which a race looks at the outcomes so far (`winnow.search.racing`); part of
            what makes scores comparable, since they decide which prompts share a batch.
        order: a file of a search (`winnow.benchmark.order`) that says which items come early; None puts them at random.
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
    held_back: float = 0.0
    confirming: bool = False
    rounds: Sequence[float] = (0.05, 0.15, 0.4, 1.0)
    order: str | None = None
    specs: tuple[Spec, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "max_gen_toks": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UserError(f"benchmark.{key}={value} is not a number of at least {low}")
        if (
            list(self.rounds) != sorted(set(self.rounds))
            or not self.rounds
            or self.rounds[0] <= 0
            or self.rounds[-1] != 1
        ):
            raise UserError(f"benchmark.rounds={list(self.rounds)} does not rise to 1, such as [0.1,0.4,1.0]")
        if not 0 <= self.held_back < 1:
            raise UserError(f"benchmark.held_back={self.held_back} is not a share below 1; give e.g. 0.2")
        if not self.tasks:
            raise UserError("benchmark.tasks is empty; give at least one task")
        object.__setattr__(self, "specs", tuple(Spec.read(name, dict(values)) for name, values in self.tasks.items()))
        if self.order is not None:
            read(self.order)
        for spec in self.specs if self.data_dir is not None else ():
            assert self.data_dir is not None
            spec.check_files(self.data_dir)

    def scores(self) -> tuple[str, ...]:
        """The names of the figures in which more is better: each benchmark's score, and its further ones."""
        return tuple(name for spec in self.specs for name in spec.scores())

    def content(self) -> str | None:
        """What the files in `data_dir` hold, as a hash; None for items that come with winnow or from the hub."""
        files = [path for spec in self.specs for path in spec.files(self.data_dir)]
        return sha256_of(files) if files else None

    def __call__(self, lm: LM, run: Run, watch: Watch | None = None, served: Served | None = None) -> Figures:
        """Scores `lm`, in rounds; writes `samples.parquet` and `rounds.json` into the run's folder.

        Args:
            watch: shown all outcomes after each round and how many are to come; what it raises ends the scoring.
            served: `lm`, where a runtime has it open.

        Raises:
            UserError: items are missing, or code cannot be run safely here.
        """
        from winnow.benchmark.score import score

        found: dict[str, list[samples.Sample]] = {spec.name: [] for spec in self.specs}
        seconds: dict[str, float] = dict.fromkeys(found, 0.0)
        spent: list[dict[str, Any]] = []
        with quiet(), serving(lm, log=run.log, served=served) as opened:
            asked, exemplars = self.asked()  # all before any is put
            adapter = scorer(opened, lm, self.batch_size, self.max_gen_toks)
            try:
                for chunk, left in self.schedule(asked):
                    begun = dict(seconds)
                    for spec in (spec for spec in self.specs if spec.name in chunk):
                        started = time.perf_counter()
                        found[spec.name] += score(adapter, spec, chunk[spec.name], exemplars[spec.name], self.seed)
                        seconds[spec.name] += time.perf_counter() - started
                    spent.append(
                        {name: [len(items), round(seconds[name] - begun[name], 4)] for name, items in chunk.items()}
                    )
                    took = sum(seconds.values()) - sum(begun.values())
                    if left and took > SILENT_S:
                        run.log(f"{sum(map(len, found.values())):,} items are scored, {left:,} to go; {took:.0f} s")
                    if watch is not None and left:
                        watch([sample for of_one in found.values() for sample in of_one], left)
            finally:
                places = {q.doc_hash: n for of_one in asked.values() for n, q in enumerate(of_one)}
                scored = [(spec, sorted(found[spec.name], key=lambda s: places[s.doc_hash])) for spec in self.specs]
                samples.write([sample for _, of_one in scored for sample in of_one], run.folder / samples.FILE)
                (run.folder / ROUNDS_FILE).write_text(json.dumps(spent) + "\n", encoding="utf-8")
        for spec, of_one in scored:
            run.log(_line(spec, of_one, seconds[spec.name]))
        return figures.figures(scored)

    def asked(self) -> tuple[dict[str, list[Question]], dict[str, Any]]:
        """The items, and the tasks that exemplars come from, by benchmark.

        Raises:
            UserError: items are missing.
        """
        from winnow.benchmark.score import questions
        from winnow.data.tasks import load

        loaded = {spec.name: load(spec, self.data_dir, self.num_fewshot) for spec in self.specs}
        chosen = (self.limit, self.seed, self.held_back, self.confirming)
        asked = {name: questions(main, *chosen) for name, (main, _) in loaded.items()}
        empty = [name for name, items in asked.items() if not items]
        if empty and self.held_back:
            kept, option = ("to confirm on", "raise") if self.confirming else ("to search with", "lower")
            raise UserError(
                f"benchmark {empty[0]} has so few items that none is left {kept} where a share of {self.held_back:g} is held "
                f"back; {option} confirm, or set confirm=0"
            )
        if empty:
            raise UserError(f"benchmark {empty[0]} has no items")
        return asked, {name: exemplars for name, (_, exemplars) in loaded.items()}

    def drawn(self) -> Order:
        """The order in which items are put."""
        return Order(self.seed) if self.order is None else read(self.order)

    def schedule(self, asked: Mapping[str, Sequence[Question]]) -> Iterator[tuple[dict[str, list[Question]], int]]:
        """The items of each round by benchmark, and how many that are right or wrong come after it; texts come last."""
        texts = {spec.name for spec in self.specs if spec.metric is None}
        drawn = self.drawn()
        items = [(name, q) for name, of_one in asked.items() if name not in texts for q in of_one]
        items.sort(key=lambda pair: drawn.time((pair[0], pair[1].doc_hash)))
        ends = [round(share * len(items)) for share in self.rounds]
        for start, end in itertools.pairwise([0, *ends]):
            chunk: dict[str, list[Question]] = defaultdict(list)
            for name, question in items[start:end]:
                chunk[name].append(question)
            if chunk:
                yield dict(chunk), len(items) - end
        if texts:
            yield {name: list(asked[name]) for name in texts}, 0


def _line(spec: Spec, found: list[samples.Sample], seconds: float) -> str:
    values = figures.figures([(spec, found)])
    if spec.metric is None:
        outcome = f"perplexity {values['perplexity']:.4g}, {values['bits_per_byte']:.3f} bits per byte"
    else:
        outcome = f"{values[spec.name]:.3f} ± {values[f'{spec.name}_stderr']:.3f}"
    return f"{spec.name}: {len(found)} items, {outcome}, {seconds:.1f} s"
