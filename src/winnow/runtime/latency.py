"""Measures the latency of whole requests: time to first token (TTFT) and time per output token (TPOT).

Every request yields exactly `output_tokens` tokens; end-of-text tokens do not end it.

TTFT = request to first token; TPOT = (total - TTFT) / (output_tokens - 1), as in the benchmarks of vLLM and NVIDIA.
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

MAX_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """Timing of one request: seconds to the first token and to the last one."""

    first_s: float
    total_s: float


def random_prompts(vocab_size: int, batch: int, tokens: int, seed: int) -> list[list[int]]:
    """Returns random token ids [batch][tokens], the same for the same seed and vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(vocab_size, (batch, tokens), generator=generator).tolist()
    return ids


def check_context(context: int | None, hardware: Hardware) -> None:
    """Checks that a request of the workload fits the model's context.

    Raises:
        UserError: it does not fit.
    """
    request_tokens = hardware.prompt_tokens + hardware.output_tokens
    if context is not None and request_tokens > context:
        raise UserError(
            f"hardware.prompt_tokens={hardware.prompt_tokens} and hardware.output_tokens={hardware.output_tokens} "
            f"make {request_tokens} tokens, the model's context is {context}; set them lower"
        )


def time_requests(
    requests: Sequence[Callable[[], Timing]], hardware: Hardware, most_seconds: float = math.inf
) -> list[list[Timing]]:
    """Returns the timings of each request function, called in turn: A B B A A B B A ... for two.

    Each is called at least `hardware.repeats` times, and more often until all together have spent `hardware.seconds`. After the
    first round, no round begins once `most_seconds` are spent.
    """
    timings: list[list[Timing]] = [[] for _ in requests]
    started = time.perf_counter()
    for round_index in range(MAX_REPEATS):
        spent_s = time.perf_counter() - started
        if round_index and (
            spent_s >= most_seconds or (round_index >= hardware.repeats and spent_s >= hardware.seconds)
        ):
            break
        indices = range(len(requests))
        for index in reversed(indices) if round_index % 2 else indices:
            timings[index].append(requests[index]())
    return timings


def summarize(timings: list[Timing], hardware: Hardware, seed: int = 0) -> Figures:
    """Returns the figures of requests of one workload: times in ms, rates in tokens a second over the whole batch."""
    batch, output_tokens = hardware.latency_batch_size, hardware.output_tokens
    first_token = [1000 * timing.first_s for timing in timings]
    per_token = [1000 * (timing.total_s - timing.first_s) / (output_tokens - 1) for timing in timings]
    total = [1000 * timing.total_s for timing in timings]
    low, high = median_interval(total, seed=seed)
    return Figures(
        {
            "latency_ms": percentile(total, 50),
            "latency_low_ms": low,
            "latency_high_ms": high,
            "ttft_ms": percentile(first_token, 50),
            "ttft_p90_ms": percentile(first_token, 90),
            "tpot_ms": percentile(per_token, 50),
            "tpot_p90_ms": percentile(per_token, 90),
            "prefill_tokens_per_s": 1000 * batch * hardware.prompt_tokens / percentile(first_token, 50),
            "decode_tokens_per_s": 1000 * batch / percentile(per_token, 50),
            "latency_requests": float(len(timings)),
        }
    )
