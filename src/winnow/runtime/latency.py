"""Latency of whole requests, as the runtime answers them: time to first token, time per further token.

Every request yields exactly `output_tokens`, whatever tokens would end it.

TTFT = request to first token; TPOT = (total - TTFT) / (output_tokens - 1); the definitions of vLLM's and NVIDIA's benches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.errors import UserError
from winnow.core.types import Figures
from winnow.hardware.bootstrap import median_interval, percentile

if TYPE_CHECKING:
    from winnow.hardware.device import Hardware

MOST_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token, and to the last."""

    first_s: float
    total_s: float


def prompts(vocab_size: int, batch: int, tokens: int, seed: int) -> list[list[int]]:
    """Random token ids [batch][tokens]: the same for the same seed and vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(vocab_size, (batch, tokens), generator=generator).tolist()
    return ids


def check_context(context: int | None, hardware: Hardware) -> None:
    """That a request of the workload fits the model's context.

    Raises:
        UserError: it does not.
    """
    wanted = hardware.prompt_tokens + hardware.output_tokens
    if context is not None and wanted > context:
        raise UserError(
            f"hardware.prompt_tokens={hardware.prompt_tokens} and hardware.output_tokens={hardware.output_tokens} "
            f"make {wanted} tokens, the model's context is {context}; set them lower"
        )


def time_requests(
    requests: Sequence[Callable[[], Timing]], hardware: Hardware, most_seconds: float = math.inf
) -> list[list[Timing]]:
    """Timings of each of the requests: of one model, or of two in turn, A B B A A B B A ...

    Each is put `hardware.repeats` times at least, and more often until `hardware.seconds` are spent by all together; but once
    `most_seconds` are spent, no more often.
    """
    timings: list[list[Timing]] = [[] for _ in requests]
    started = time.perf_counter()
    for done in range(MOST_REPEATS):
        spent_s = time.perf_counter() - started
        if done and (spent_s >= most_seconds or (done >= hardware.repeats and spent_s >= hardware.seconds)):
            break
        places = range(len(requests))
        for place in reversed(places) if done % 2 else places:
            timings[place].append(requests[place]())
    return timings


def summarize(timings: list[Timing], hardware: Hardware, seed: int = 0) -> Figures:
    """The figures of requests of one workload; times in ms, rates in tokens a second over the whole batch."""
    batch, output_tokens = hardware.latency_batch_size, hardware.output_tokens
    first = [1000 * t.first_s for t in timings]
    each = [1000 * (t.total_s - t.first_s) / (output_tokens - 1) for t in timings]
    total = [1000 * t.total_s for t in timings]
    low, high = median_interval(total, seed=seed)
    return Figures(
        {
            "latency_ms": percentile(total, 50),
            "latency_low_ms": low,
            "latency_high_ms": high,
            "ttft_ms": percentile(first, 50),
            "ttft_p90_ms": percentile(first, 90),
            "tpot_ms": percentile(each, 50),
            "tpot_p90_ms": percentile(each, 90),
            "prefill_tokens_per_s": 1000 * batch * hardware.prompt_tokens / percentile(first, 50),
            "decode_tokens_per_s": 1000 * batch / percentile(each, 50),
            "latency_requests": float(len(timings)),
        }
    )
