"""Latency of whole requests through `model.generate`, as its users have it: time to first token, time per further token.

`generate` and not a loop of our own: what a strategy changes may live in the generation settings (a quantized cache) and
would be missed by one. A stopping criterion is the clock: it sees every token, costs microseconds, and, unlike streamers,
works for batches. Every request yields exactly `output_tokens`: end-of-text tokens are masked until then.

TTFT = request to first token; TPOT = (total - TTFT) / (output_tokens - 1); the definitions of vLLM's and NVIDIA's benches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.hardware.statistics import median_interval, percentile
from winnow.types import Figures, UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.hardware.device import Hardware

MOST_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token, and to the last."""

    first_s: float
    total_s: float


class _Clock:
    """A stopping criterion that stops nothing and notes when the first token was there."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.first: float | None = None
        self._never: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        import torch

        if self.first is None:
            if self.cuda:
                torch.cuda.synchronize()
            self.first = time.perf_counter()
            self._never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        assert self._never is not None
        return self._never


def prompt(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Random token ids [batch, tokens] on the model's device: the same for the same seed and vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids_bt = torch.randint(model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)
    return ids_bt.to(model.device)


def request(model: PreTrainedModel, prompt_bt: Tensor, output_tokens: int) -> Timing:
    """Answers prompts [batch, time] greedily with exactly `output_tokens` each, and times it.

    Raises:
        RuntimeError: another number of tokens came out: the model's own `generate` does not keep to its arguments.
    """
    import torch
    from transformers import StoppingCriteriaList

    cuda = prompt_bt.is_cuda
    clock = _Clock(cuda)
    with torch.inference_mode():
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        output_bt = model.generate(  # type: ignore[operator]
            input_ids=prompt_bt,
            attention_mask=torch.ones_like(prompt_bt),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            pad_token_id=0,  # never used: all end together
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        if cuda:
            torch.cuda.synchronize()
        ended = time.perf_counter()
    made = output_bt.shape[1] - prompt_bt.shape[1]
    if made != output_tokens or clock.first is None:
        raise RuntimeError(f"asked for {output_tokens} tokens, {type(model).__name__}.generate made {made}")
    return Timing(first_s=clock.first - started, total_s=ended - started)


def check_context(model: PreTrainedModel, hardware: Hardware) -> None:
    """That a request of the workload fits the model's context.

    Raises:
        UserError: it does not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = hardware.prompt_tokens + hardware.output_tokens
    if limit is not None and wanted > limit:
        raise UserError(
            f"hardware.prompt_tokens={hardware.prompt_tokens} and hardware.output_tokens={hardware.output_tokens} "
            f"make {wanted} tokens, the model's context is {limit}; set them lower"
        )


def time_requests(model: PreTrainedModel, prompt_bt: Tensor, hardware: Hardware) -> list[Timing]:
    """Timings of `hardware.repeats` requests at least, and of more until `hardware.seconds` are spent."""
    timings: list[Timing] = []
    started = time.perf_counter()
    while len(timings) < hardware.repeats or (
        time.perf_counter() - started < hardware.seconds and len(timings) < MOST_REPEATS
    ):
        timings.append(request(model, prompt_bt, hardware.output_tokens))
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
