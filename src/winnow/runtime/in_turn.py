"""Measures a candidate and the base model in turn, A B B A A B ..., when a search compares them.

The speed of a machine varies: its clock, its temperature and its neighbours change within minutes, and more so over the hours of a
search. Alternating requests of two models meet the same conditions, so their ratio holds even where the times do not. A search
compares trials by `latency_ms`, so the candidate's latency is converted to the conditions of the base model's own trial:

    latency_ratio = median latency of the candidate / median latency of the base model, both measured now
    latency_ms = latency_ratio * latency_ms of the base model's trial

All other times of the candidate are multiplied by the same factor, and rates are divided by it, so that they stay consistent.
If the base model's trial was disturbed, its latency is only a scale, but the ratios still hold. The candidate's own median is
reported as `latency_raw_ms`, and the base model's current one as `base_latency_ms`.

The base model is opened beside the candidate after the candidate's memory has been measured. If both do not fit, the candidate
is measured alone, and the log says so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
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

logger = logging.getLogger(__name__)

SOURCE = "measured, in turn with the base model"
_TIMES = ("ttft_ms", "ttft_p90_ms", "tpot_ms", "tpot_p90_ms")
_RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Base:
    """The base model that a candidate is measured in turn with.

    Attributes:
        latency_ms: the latency in its own trial.
        peak_memory_bytes: the peak memory in its own trial.
        memory_limit_bytes: memory limit of the process that has both models open; None is no limit.
    """

    lm: LM
    latency_ms: float
    peak_memory_bytes: float
    memory_limit_bytes: float | None = None


@contextlib.contextmanager
def open_base(
    base: Base | None, candidate: Served, candidate_bytes: float, hardware: Hardware
) -> Iterator[Served | None]:
    """Opens the base model beside the candidate for a block; yields None if there is none, or if both do not fit."""
    from winnow.runtime import serving

    if base is None:
        yield None
        return
    reason = refusal_reason(base, candidate, candidate_bytes, hardware)
    with contextlib.ExitStack() as stack:
        served_base = None
        if not reason:
            try:
                served_base = stack.enter_context(serving(base.lm, hardware))
            except Exception as error:  # it opened in its own trial, so the candidate beside it is the cause
                reason = f"opening it fails ({error})"
        if reason:
            logger.info(f"latency: measured alone, not in turn with the base model: {reason}")
        yield served_base
    base.lm.release()


def refusal_reason(base: Base, candidate: Served, candidate_bytes: float, hardware: Hardware) -> str:
    """Returns why the base model cannot be opened beside the candidate, which takes `candidate_bytes`; empty if it can."""
    if candidate.name == "vllm":
        return "vLLM takes a fixed share of the GPU for each model"
    total_bytes, limit = base.peak_memory_bytes + candidate_bytes, float(hardware.memory_bytes())
    if base.memory_limit_bytes is not None:
        limit = min(limit, base.memory_limit_bytes)
    if total_bytes > limit:
        return f"both take {total_bytes / 1e9:.1f} GB, and there are {limit / 1e9:.1f} GB"
    if hardware.device == "cuda":
        import torch

        free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        if base.peak_memory_bytes > free:
            return f"it takes {base.peak_memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU are free"
    return ""


def summarize(
    timings: list[Timing], base_timings: list[Timing], base_latency_ms: float, hardware: Hardware, seed: int = 0
) -> Figures:
    """Returns the candidate's figures, converted to the conditions of the base model's trial; see the module docstring.

    Args:
        timings, base_timings: timings of requests in turn, equally many; those with the same index are a pair.
        base_latency_ms: latency of the base model's trial.
    """
    figures = latency.summarize(timings, hardware, seed)
    candidate_ms, base_ms = ([1000 * timing.total_s for timing in sample] for sample in (timings, base_timings))
    base_now_ms = percentile(base_ms, 50)
    ratio = percentile(candidate_ms, 50) / base_now_ms
    low, high = ratio_interval(candidate_ms, base_ms, seed=seed)
    factor = base_latency_ms / base_now_ms
    scaled = {
        "latency_ms": ratio * base_latency_ms,
        "latency_low_ms": low * base_latency_ms,
        "latency_high_ms": high * base_latency_ms,
        **{name: figures[name] * factor for name in _TIMES},
        **{name: figures[name] / factor for name in _RATES},
    }
    raw = {"latency_ratio": ratio, "latency_raw_ms": figures["latency_ms"], "base_latency_ms": base_now_ms}
    return Figures({**figures, **scaled, **raw}, dict.fromkeys(scaled, SOURCE))
