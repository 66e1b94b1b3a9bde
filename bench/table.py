"""The table of every strategy: what each makes of the embedded model, found by the search itself, and what that cost.

    python bench/table.py run                     # hours; started again, it goes on where it was
    python bench/table.py pack [STUDY [AGAIN]]    # writes bench/table/*.parquet from its folder (and of what was measured again)

`search.py agent=grid` evaluates the space below exhaustively: every trial is compressed, saved, loaded back, measured and
scored on all items. Packed are all figures, what each part took in seconds, and every item's outcome; `search_efficiency.py`
replays searches on these.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import REPOSITORY

FOLDER = Path(__file__).with_name("table")
STUDY = "table"
METHODS = "method=[wanda,magnitude,depth,width,lora,rtn,gptq,nf4,int8,gguf]"
SPACE = [
    "method.wanda.pattern=unstructured",
    "method.wanda.allocation=uniform",
    "method.wanda.sparsity=choice(0.3,0.5,0.6,0.7)",
    "method.magnitude.pattern=unstructured",
    "method.magnitude.allocation=uniform",
    "method.magnitude.sparsity=choice(0.3,0.5)",
    "method.depth.share=choice(0.2,0.4)",
    "method.depth.by=influence",
    "method.width.mlp=choice(0.5,0.75)",
    "method.width.heads=1.0",
    "method.width.hidden=1.0",
    "method.lora.rank=32",
    "method.lora.learning_rate=0.003",
    "method.lora.steps=100",
    "method.rtn.group_size=choice(32,128)",
    "method.gptq.bits=choice(2,3,4)",
    "method.gptq.group_size=choice(32,128)",
    "method.gguf.type=choice(Q8_0,Q4_K_M,Q3_K_M,Q2_K)",
    "method.gguf.imatrix=true",
]
SETTINGS = [
    "agent=grid",
    f"study={STUDY}",
    "budget.trials=100000",
    "convergence=null",
    "first_slots=[]",
    "keep=none",
    "confirm=0",
    "racing.error_rate=0",
    "racing.hopeless_ratio=0",
    "wandb.mode=disabled",
]


def run(arguments: list[str]) -> None:
    """The whole space, in order: what begins alike comes one after the other, and its beginning is made once."""
    line = [sys.executable, str(REPOSITORY / "search.py"), *SETTINGS, METHODS, *SPACE, *arguments]
    sys.exit(subprocess.run(line, cwd=REPOSITORY, check=False).returncode)


@functools.cache
def space() -> Any:
    """The space, as `search.py` reads it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from winnow.core.cli import CONF
    from winnow.search import overrides
    from winnow.study.space import read_space

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("search", overrides=[METHODS])
    return read_space(OmegaConf.to_container(cfg.method, resolve=True), overrides.parse(SPACE).narrowed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """A strategy of the table.

    Attributes:
        known: figures that follow from its configuration.
        seconds: of each part, as a trial records them.
        stages: of each, `method`, `seconds`, `reused`.
        rounds: of each round, by benchmark, items and seconds.
    """

    strategy: Any
    figures: dict[str, float]
    known: dict[str, float]
    seconds: dict[str, float]
    stages: list[dict[str, Any]]
    rounds: list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """All strategies, and the outcomes of all items.

    Attributes:
        items: benchmark and subtask of each that is right or wrong, in the order in which they are put.
        weights: share of each item in the accuracy.
        scores: outcomes [strategies, items].
    """

    rows: tuple[Row, ...]
    items: tuple[tuple[str, str], ...]
    weights: np.ndarray
    scores: np.ndarray


def pack(*folders: Path) -> None:
    """From the trials' folders of studies; a strategy counts as the last of them has measured it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from winnow.benchmark.order import Order
    from winnow.benchmark.samples import read

    latest: dict[Any, Path] = {}
    for folder in folders:
        found = [p for p in (folder / "trials").iterdir() if (p / "outcome.json").is_file()]
        for trial in sorted(found, key=lambda p: int(p.name)):
            latest[strategy_of(json.loads((trial / "outcome.json").read_text())["overrides"]).overrides] = trial
    trials = list(latest.values())
    rows, outcomes, order = [], [], None
    known, even = forecasts(trials), Order(1234)
    for trial, sizes in zip(trials, known, strict=True):
        outcome = json.loads((trial / "outcome.json").read_text())
        if outcome["reason"]:
            print(f"{trial.name}: {outcome['reason']}: {outcome['message']}")
            continue
        samples = sorted(read(trial), key=lambda s: (s.correct is None, even.time((s.benchmark, s.doc_hash))))
        keys = [(s.benchmark, s.subtask, s.doc_hash) for s in samples]
        order = order or keys
        if keys != order:
            raise SystemExit(f"trial {trial.name} was asked other items than the first")
        outcomes.append([s.score for s in samples])
        rows.append(
            {
                "overrides": [o for o in outcome["overrides"] if o.startswith("method")],
                "figures": json.dumps(outcome["figures"]),
                "known": json.dumps(sizes),
                "seconds": json.dumps(outcome["seconds"]),
                "stages": json.dumps(outcome["stages"]),
                "rounds": (trial / "rounds.json").read_text().strip(),
            }
        )
    assert order is not None
    FOLDER.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), FOLDER / "strategies.parquet", compression="zstd", compression_level=19)
    scores = np.array(outcomes, np.float32).T
    columns = {name: [key[i] for key in order] for i, name in enumerate(("benchmark", "subtask", "doc_hash"))}
    made = pa.table({**columns, "scores": list(scores)})
    pq.write_table(made, FOLDER / "items.parquet", compression="zstd", compression_level=19)
    size = sum(path.stat().st_size for path in FOLDER.glob("*.parquet"))
    print(f"{len(rows)} strategies, {len(order):,} items, {size / 1e6:.2f} MB in {FOLDER}")


def forecasts(trials: list[Path]) -> list[dict[str, float]]:
    """What the search knows of each trial's strategy before it runs."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from winnow.core.cli import CONF
    from winnow.search.forecaster import forecaster

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("search", overrides=[METHODS, *(o for o in SPACE if "choice" not in o)])
    answer = forecaster(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    asked = []
    for trial in trials:
        strategy = strategy_of(json.loads((trial / "outcome.json").read_text())["overrides"])
        asked.append({"methods": list(strategy.methods), "knobs": dict(strategy.knobs)})
    return [found["figures"] for found in answer(asked)]


def strategy_of(overrides: list[str]) -> Any:
    """The strategy of the space that has these overrides."""
    wanted = {o for o in overrides if o.startswith("method")}
    return _by_overrides()[frozenset(wanted)]


@functools.cache
def _by_overrides() -> dict[frozenset[str], Any]:
    return {frozenset(strategy.overrides): strategy for strategy in space().all(1)}


def load() -> Table:
    """The table as it is shipped."""
    import pyarrow.parquet as pq

    from winnow.benchmark.samples import Sample
    from winnow.build import benchmark
    from winnow.search.early_stopping import weights_of
    from winnow.study.objectives import KNOWN

    rows = []
    for row in pq.read_table(FOLDER / "strategies.parquet").to_pylist():
        parts = {name: json.loads(row[name]) for name in ("figures", "known", "seconds", "stages", "rounds")}
        rows.append(Row(strategy_of(row["overrides"]), **parts))
    items = pq.read_table(FOLDER / "items.parquet")
    from hydra import compose, initialize_config_dir

    from winnow.core.cli import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        specs = benchmark(compose("search", overrides=[METHODS])).specs  # type: ignore[attr-defined]
    texts = {spec.name for spec in specs if spec.metric is None}
    keys = list(zip(items["benchmark"].to_pylist(), items["subtask"].to_pylist(), strict=True))
    scored = [number for number, (name, _) in enumerate(keys) if name not in texts]
    samples = [Sample(*keys[n], "", "", "", "", True, 0.0) for n in scored]
    weights = weights_of(samples, specs, [KNOWN["accuracy"]])[:, 0]
    scores = np.stack([np.asarray(items["scores"][n].as_py(), np.float32) for n in scored], axis=1)
    return Table(tuple(rows), tuple(keys[n] for n in scored), weights, scores)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2:])
    elif sys.argv[1:2] == ["pack"]:
        pack(*(Path(folder) for folder in sys.argv[2:] or [REPOSITORY / "outputs" / STUDY]))
    else:
        sys.exit(__doc__)
