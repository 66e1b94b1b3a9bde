"""Every item's outcome, as rows of `samples.parquet`: what comparisons of two models are made of."""

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
    """One item of a benchmark and what a model made of it.

    Attributes:
        doc_hash: SHA-256 of the item; what two runs are joined on.
        prompt_hash: SHA-256 of all that the model was shown; equal wherever two runs can be compared.
        prediction, target: the answer as extracted, and the right one.
        correct: None where there is no right and wrong (text).
        score: the benchmark's metric for this item; for text its log-likelihood in nats.
        log_likelihoods: in nats, of each choice in order, or of the text; empty for generated answers.
        extra: `response` as generated, `outcome` of a program, `tokens` and `bytes` of a text, further figures.
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
    """One row a sample; `extra` becomes JSON."""
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
    """The samples of a file, or of a folder that `evaluate.py` wrote.

    Raises:
        UserError: there is no such file, or it is not one of samples.
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
