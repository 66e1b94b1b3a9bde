"""Reads and writes `samples.parquet`, which holds the outcome of every item as a row; comparisons of models use it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError

FILE = "samples.parquet"


@dataclass(frozen=True)
class Sample:
    """A model's outcome on one item of a benchmark.

    Attributes:
        doc_hash: SHA-256 of the item, the key on which two runs are joined.
        prompt_hash: SHA-256 of the model's whole input; runs can be compared only where it is equal.
        prediction, target: the extracted answer, and the right one.
        correct: None for text, which is neither right nor wrong.
        score: the benchmark's metric for this item; for text its log-likelihood in nats.
        log_likelihoods: log-likelihoods in nats of each choice in order, or of the text; empty for generated answers.
        extra: the generated `response`, the `outcome` of a program, the `tokens` and `bytes` of a text, further figures.
    """

    benchmark: str
    subtask: str
    doc_hash: str
    prompt_hash: str
    prediction: str
    target: str
    correct: bool | None
    score: float
    log_likelihoods: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def write(samples: Sequence[Sample], path: Path) -> None:
    """Writes one row per sample, with `extra` as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in ("benchmark", "subtask", "doc_hash", "prompt_hash", "prediction", "target")]
        + [("correct", pa.bool_()), ("score", pa.float64()), ("log_likelihoods", pa.list_(pa.float64()))]
        + [("extra", pa.string())]
    )
    rows = [dataclasses.asdict(s) | {"extra": json.dumps(s.extra, ensure_ascii=False, sort_keys=True)} for s in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def read(path: str | Path) -> list[Sample]:
    """Loads the samples of a file, or of a folder that `evaluate.py` wrote.

    Raises:
        UserError: the file does not exist, or it is not a table of samples.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file} does not exist; evaluate.py writes it")
    try:
        rows = pq.read_table(file, partitioning=None).to_pylist()
        return [
            Sample(**(r | {"log_likelihoods": tuple(r["log_likelihoods"]), "extra": json.loads(r["extra"])}))
            for r in rows
        ]
    except (pa.ArrowInvalid, TypeError, KeyError) as error:
        raise UserError(f"{file} is not a table of samples: {error}") from None
