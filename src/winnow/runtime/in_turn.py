"""Candidate and base model measured in turn, A B B A A B ..., where a search compares them.

A machine is not equally fast at all times: its clock, its temperature and its neighbours change within minutes, and more so
over the hours of a search. Requests of two models that alternate meet the same conditions, so that their ratio holds where the
times themselves do not. A search compares trials by `latency_ms`, and so the candidate's is brought to the conditions in which
the base model's own trial was measured:

    latency_ratio = median latency of the candidate / median latency of the base model, both measured now
    latency_ms = latency_ratio * latency_ms of the base model's trial

All other times of the candidate are multiplied by the same factor, and rates are divided by it, so that they still fit together.
Where the base model's trial was disturbed, its latency is no more than a scale; the ratios hold all the same. The candidate's own
median is kept as `latency_raw_ms`, the base model's of now as `base_latency_ms`.

The base model is opened beside the candidate after the candidate's memory has been measured. Where both do not fit, the
candidate is measured alone, and the log says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.types import Figures
from winnow.hardware.bootstrap import percentile, ratio_interval
from winnow.model.lm import LM
from winnow.runtime import latency
from winnow.runtime.latency import Timing

if TYPE_CHECKING:
    from winnow.hardware.device import Hardware
    from winnow.runtime import Served

SOURCE = "measured, in turn with the base model"
_TIMES = ("ttft_ms", "ttft_p90_ms", "tpot_ms", "tpot_p90_ms")
_RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Base:
    """The base model, to measure a candidate in turn with.

    Attributes:
        latency_ms: what its own trial has found.
        peak_memory_bytes: likewise.
        memory_limit_bytes: of the process that has both open; None is without.
    """

    lm: LM
    latency_ms: float
    peak_memory_bytes: float
    memory_limit_bytes: float | None = None


@contextlib.contextmanager
def opened(
    base: Base | None, candidate: Served, candidate_bytes: float, hardware: Hardware, log: Callable[[str], None]
) -> Iterator[Served | None]:
    """The base model, open for this block beside the candidate; None where there is none, or where both do not fit."""
    from winnow.runtime import serving

    if base is None:
        yield None
        return
    reason = refusal(base, candidate, candidate_bytes, hardware)
    with contextlib.ExitStack() as stack:
        other = None
        if not reason:
            try:
                other = stack.enter_context(serving(base.lm, hardware, log))
            except (
                Exception
            ) as error:  # it did open in its own trial: what is different here is the candidate beside it
                reason = f"opening it fails ({error})"
        if reason:
            log(f"latency: measured alone, not in turn with the base model: {reason}")
        yield other
    base.lm.release()


def refusal(base: Base, candidate: Served, candidate_bytes: float, hardware: Hardware) -> str:
    """Why the base model cannot be opened beside the candidate, which takes `candidate_bytes`; empty where it can."""
    if candidate.name == "vllm":
        return "vLLM takes a fixed share of the GPU for each model"
    both, limit = base.peak_memory_bytes + candidate_bytes, float(hardware.memory_bytes())
    if base.memory_limit_bytes is not None:
        limit = min(limit, base.memory_limit_bytes)
    if both > limit:
        return f"both take {both / 1e9:.1f} GB, and there are {limit / 1e9:.1f} GB"
    if hardware.device == "cuda":
        import torch

        free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        if base.peak_memory_bytes > free:
            return f"it takes {base.peak_memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU are free"
    return ""


def summarize(
    timings: list[Timing], base_timings: list[Timing], base_latency_ms: float, hardware: Hardware, seed: int = 0
) -> Figures:
    """The candidate's figures in the conditions of the base model's trial; see above.

    Args:
        timings, base_timings: of requests in turn, as many of each; those of one place belong together.
        base_latency_ms: of the base model's trial.
    """
    figures = latency.summarize(timings, hardware, seed)
    ours, theirs = ([1000 * t.total_s for t in found] for found in (timings, base_timings))
    now_ms = percentile(theirs, 50)
    ratio = percentile(ours, 50) / now_ms
    low, high = ratio_interval(ours, theirs, seed=seed)
    clock = base_latency_ms / now_ms
    scaled = {
        "latency_ms": ratio * base_latency_ms,
        "latency_low_ms": low * base_latency_ms,
        "latency_high_ms": high * base_latency_ms,
        **{name: figures[name] * clock for name in _TIMES},
        **{name: figures[name] / clock for name in _RATES},
    }
    raw = {"latency_ratio": ratio, "latency_raw_ms": figures["latency_ms"], "base_latency_ms": now_ms}
    return Figures({**figures, **scaled, **raw}, dict.fromkeys(scaled, SOURCE))
