"""Serves models by vLLM in this process, offline through its engine; it needs a CUDA device and `pip install vllm`.

lm-eval's own vLLM class opens the model and scores. The same engine answers the timed requests; it is stepped by hand, so that
the first token is noticed. The engine takes its share of the device's memory when it starts, and frees it when the process ends.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.hardware.device import Hardware
from winnow.hardware.footprint import PeakMemory, weights_memory_bytes
from winnow.model.lm import LM
from winnow.runtime.latency import Timing

if TYPE_CHECKING:
    import numpy as np


def version(device: str) -> str | None:
    if device == "cuda":
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version("vllm")
    return None


class Runtime:
    """A runtime for `lm.path`, a folder or hub id, in a vLLM engine.

    Raises:
        UserError: there is no CUDA device, vLLM is not installed, or the model only exists in memory.
    """

    name = "vllm"
    runtime_mode: str | None = None

    def __init__(self, lm: LM, hardware: Hardware) -> None:
        if version(hardware.device) is None:
            raise UserError(
                f"hardware.runtime=vllm needs vLLM and a CUDA device (here: hardware={hardware.name}, "
                f"hardware.device={hardware.device}); pip install vllm and choose a GPU, or use hardware.runtime=transformers"
            )
        if lm.path is None:
            raise UserError(f"hardware.runtime=vllm reads models from disk, and {lm.name} only exists in memory")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # runs the engine and its weights in this process
        from lm_eval.models.vllm_causallms import VLLM

        self.opened = VLLM(  # lm-eval's model class, which benchmarks score with; its engine serves all other requests
            pretrained=lm.path,
            dtype=hardware.compute_dtype,
            trust_remote_code=lm.loading.trust_remote_code,
            tensor_parallel_size=hardware.devices,
            batch_size="auto",
            enable_prefix_caching=False,  # otherwise a repeated request would skip its prompt
        )
        self._llm: Any = self.opened.model
        self._numbers = itertools.count()
        settings = self._llm.llm_engine.model_config
        self.vocab_size = int(settings.get_vocab_size())
        self.context: int | None = int(settings.max_model_len)

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (answer,) = self._llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        pairs = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        return [float(logprobs[token].logprob) if token in logprobs else math.nan for token, logprobs in pairs]

    def next_tokens(self, ids: Sequence[int], targets: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("vLLM tells the likeliest tokens of a prompt, not those that one asks for")

    def next_tokens_batch(
        self, rows: Sequence[Sequence[int]], targets: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        targets_by_row: Sequence[np.ndarray | int] = [targets] * len(rows) if isinstance(targets, int) else targets
        return [self.next_tokens(ids, row_targets) for ids, row_targets in zip(rows, targets_by_row, strict=True)]

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        started_ids: set[str] = set()
        generated = 0
        first = None
        started = time.perf_counter()
        for ids in prompts:
            engine.add_request(f"timed-{next(self._numbers)}", {"prompt_token_ids": list(ids)}, sampling)
        while engine.has_unfinished_requests():
            for answer in engine.step():
                started_ids.add(answer.request_id)
                generated += len(answer.outputs[0].token_ids) if answer.finished else 0
            if first is None and len(started_ids) == len(prompts):
                first = time.perf_counter()
        total_s = time.perf_counter() - started
        if first is None or generated != len(prompts) * output_tokens:
            raise RuntimeError(f"asked for {len(prompts)} x {output_tokens} tokens, vLLM made {generated}")
        return Timing(first_s=first - started, total_s=total_s)

    def weights_memory_bytes(self) -> int:
        return int(sum(self._llm.apply_model(weights_memory_bytes)))  # sum over the devices' shards

    def peak_memory(self) -> PeakMemory:
        return PeakMemory("cuda", torch_allocator=False)

    def close(self) -> None:
        del self._llm, self.opened
