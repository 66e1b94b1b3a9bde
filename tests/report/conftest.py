"""A study by hand: the base model, a front of three, a dominated trial and two failures with hostile text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from winnow.core.errors import Reason
from winnow.core.types import Objective, Strategy, Summary, Trial

HOSTILE = '</script><img src=x onerror="alert(1)"> & \u2028 \x1b[31mred\x00'


def _trial(number: int, strategy: Strategy, accuracy: float, size: float, latency: float) -> Trial:
    return Trial(
        number,
        strategy,
        figures={
            "accuracy": accuracy,
            "size_bytes": size,
            "latency_ms": latency,
            "energy_wh": 0.0004,
            "perplexity": 3.4,
        },
        sources={"accuracy": "measured", "latency_ms": "measured", "energy_wh": "estimated", "size_bytes": "counter"},
        seconds={"compress": 4.0, "evaluate": 8.0, "overhead": 0.3, "total": 12.3},
        commands=(
            f"python compress.py model=nano '{strategy.overrides[0]}' outputs=study/{number}",
            f"python evaluate.py model.path=study/{number}/artifact  benchmark=nano",
        ),
        proposed_by="tpe",
    )


@pytest.fixture
def summary() -> Summary:
    rtn4 = Strategy(("rtn",), {"method.rtn.bits": 4, "method.rtn.group_size": 64})
    pruned = Strategy(("wanda", "gptq"), {"method.wanda.sparsity": 0.5, "method.gptq.bits": 3})
    trials = (
        _trial(0, Strategy(), 0.95, 9.0e6, 4.0),
        _trial(1, rtn4, 0.936, 2.88e6, 3.1),
        _trial(2, pruned, 0.90, 2.2e6, 3.3),
        replace(_trial(3, rtn4, 0.93, 3.0e6, 3.2), commands=("python compress.py note='<b>3</b>  two  spaces'",)),
        Trial(
            4,
            Strategy((HOSTILE,), {}),
            reason=Reason.ERROR,
            message=f"Traceback:\n  a line\nValueError: {HOSTILE}",
            commands=("python compress.py --failed 4",),
            seconds={"total": 1.5},
        ),
        Trial(5, rtn4, reason=Reason.TIMEOUT, message="longer than 60 s"),
    )
    return Summary(
        name="nano <study>",
        fingerprint={"model": {"name": "nano", "sha256": "6f1c"}, "seed": 0, "note": HOSTILE},
        objectives=(
            Objective("accuracy", True),
            Objective("size_bytes", False, "B"),
            Objective("latency_ms", False, "ms"),
        ),
        trials=trials,
        front=(0, 1, 2),
        hypervolume=(0.1, 0.4, 0.5, 0.5, 0.5, math.nan),
    )
