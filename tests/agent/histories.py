"""A small space, histories over it, and an outlook, for the tests of agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from winnow.core.errors import Reason
from winnow.core.types import Objective, Strategy, Trial
from winnow.search.forecaster import Forecasts
from winnow.study.history import History
from winnow.study.policy import UniformDraw
from winnow.study.space import Space, read_space

METHODS = {
    "wanda": {"_target_": "winnow.method.prune.Wanda", "sparsity": 0.5, "pattern": "unstructured"},
    "magnitude": {"_target_": "winnow.method.prune.Magnitude", "sparsity": 0.5, "pattern": "unstructured"},
    "rtn": {"_target_": "winnow.method.rtn.RTN", "bits": 4, "group_size": 64},
    "nf4": {"_target_": "winnow.method.bnb.NF4"},
    "kv": {"_target_": "winnow.method.kv.KV", "bits": 8, "group_size": 64},
}
OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False, "bytes"))


def space_of(*methods: str) -> Space:
    return read_space({name: METHODS[name] for name in methods or METHODS}, {})


def outlook(**refusals: str) -> Forecasts:
    """One that refuses strategies with these methods."""

    def answer(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"refusal": next((refusals[m] for m in s["methods"] if m in refusals), "")} for s in strategies]

    return Forecasts(answer)


def rtn(bits: int, group_size: int = 64) -> Strategy:
    return Strategy(("rtn",), {"method.rtn.bits": bits, "method.rtn.group_size": group_size})


def add(history: History, strategy: Strategy, figures: Mapping[str, float], **more: Any) -> Trial:
    number = len(history.trials)
    history.begin(number, strategy)
    trial = Trial(number, strategy, figures, **more)
    history.end(trial)
    return trial


def started(*strategies: Strategy) -> History:
    """The base model, and these with less of everything the further one comes."""
    history = History(OBJECTIVES)
    for place, strategy in enumerate((Strategy(), *strategies)):
        add(history, strategy, {"accuracy": 0.9 - 0.1 * place, "size_bytes": 1000.0 - 100 * place})
    return history


def random_history(space: Space, trials: int, message: str = "") -> History:
    """Many trials, each seventh failed with the message."""
    rng = np.random.default_rng(0)
    history = History(OBJECTIVES)
    add(history, Strategy(), {"accuracy": 0.9, "size_bytes": 1000.0})
    for number in range(1, trials):
        strategy = space.draw(UniformDraw(rng))
        if number % 7 == 0:
            add(history, strategy, {}, reason=Reason.ERROR, message=message or "ValueError: " + "x" * 500)
        else:
            add(history, strategy, {"accuracy": float(rng.random()), "size_bytes": float(rng.integers(100, 1000))})
    return history
