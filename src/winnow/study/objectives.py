"""Defines the figures that a study can optimise, each with its direction, and the constraints on them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.core.errors import UserError
from winnow.core.types import Objective

# resolutions: a few bytes of a header, or the noise of a clock, must not put a strategy on the front
BYTES, TIME = 0.001, 0.05
KL = "kl_to_base"  # divergence from the base model, nats per token: not optimised, but an early and cheap signal

# the figures that meters and all benchmarks report; benchmarks add one score per task
KNOWN: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("accuracy", True),
        Objective("perplexity", False),
        Objective("bits_per_byte", False, "bits"),
        Objective("size_bytes", False, "bytes", BYTES),
        Objective("weight_bytes", False, "bytes", BYTES),
        Objective("weights_memory_bytes", False, "bytes", BYTES),
        Objective("peak_memory_bytes", False, "bytes", BYTES),
        Objective("latency_ms", False, "ms", TIME),
        Objective("ttft_ms", False, "ms", TIME),
        Objective("ttft_p90_ms", False, "ms", TIME),
        Objective("tpot_ms", False, "ms", TIME),
        Objective("tpot_p90_ms", False, "ms", TIME),
        Objective("prefill_tokens_per_s", True, "tokens/s", TIME),
        Objective("decode_tokens_per_s", True, "tokens/s", TIME),
        Objective("energy_wh_per_1k_tokens", False, "Wh", TIME),
        Objective("co2_g_per_1k_tokens", False, "g", TIME),
    )
}


def objectives(names: Sequence[str], scores: Sequence[str]) -> tuple[Objective, ...]:
    """Returns the objectives of a study.

    Args:
        names: the names in the user's order.
        scores: the benchmark's own scores (all better when higher), allowed in addition to `KNOWN`.

    Raises:
        UserError: there is no name, a name twice, or a name that nothing reports.
    """
    reported = KNOWN | {name: Objective(name, True) for name in scores}
    if not names:
        raise UserError("objectives=[] is empty; give some, e.g. objectives=[accuracy,size_bytes]")
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(f"objectives={list(names)}: {name} is there twice")
        if name not in reported:
            near = difflib.get_close_matches(name, reported, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"objectives: {name} is not reported; {hint}there are: {', '.join(reported)}")
    return tuple(reported[name] for name in names)


ACCURACY_DROP = "accuracy_drop"
ALIASES = {"memory_bytes": "peak_memory_bytes"}


def constraints(limits: Any, scores: Sequence[str]) -> dict[str, float]:
    """Returns the limits that trials of the front must keep, by figure.

    Args:
        limits: a mapping, or None: upper limits of figures to minimise, lower limits of figures to maximise;
            `accuracy_drop` is how far the accuracy may lie below the base model's.
        scores: the benchmark's own scores, as in `objectives`.

    Raises:
        UserError: a figure that nothing reports, or a limit that is not a number.
    """
    if not isinstance(limits, Mapping | None):
        raise UserError(f"constraints={limits} has no limits in it; give e.g. constraints={{accuracy_drop: 0.02}}")
    reported = KNOWN | {name: Objective(name, True) for name in scores}
    limits = {ALIASES.get(name, name): limit for name, limit in (limits or {}).items()}
    for name, limit in limits.items():
        if name != ACCURACY_DROP and name not in reported:
            near = difflib.get_close_matches(name, [ACCURACY_DROP, *reported], n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(
                f"constraints.{name} is not reported; {hint}there are: {ACCURACY_DROP}, {', '.join(reported)}"
            )
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise UserError(f"constraints.{name}={limit} is no number; give e.g. constraints={{accuracy_drop: 0.02}}")
    return {name: float(limit) for name, limit in limits.items()}


def broken_constraints(
    figures: Mapping[str, float], limits: Mapping[str, float], base: Mapping[str, float] | None
) -> list[str]:
    """Returns a phrase for each constraint that a trial's figures break.

    Args:
        base: figures of the base model.
    """
    broken = []
    for name, limit in limits.items():
        if name == ACCURACY_DROP:
            drop = base["accuracy"] - figures["accuracy"] if base and "accuracy" in figures else 0.0
            if drop > limit:
                broken.append(f"its accuracy is {drop:.3f} below the base model's, over accuracy_drop={limit:g}")
        elif name in figures:
            more_is_better = name not in KNOWN or KNOWN[name].maximize
            if figures[name] < limit if more_is_better else figures[name] > limit:
                broken.append(f"{name} is {figures[name]:.4g}, {'below' if more_is_better else 'over'} {limit:g}")
    return broken
