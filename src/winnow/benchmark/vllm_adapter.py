"""Wraps lm-eval's vLLM model, with the token ids and answer limits of the other runtimes."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM

from winnow.benchmark.transformers_adapter import Requests
from winnow.runtime.vllm import Runtime


def make_adapter(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> VLLMAdapter:
    """Returns the adapter over an open engine; vLLM uses the engine's tokenizer and chooses its batches itself."""
    return VLLMAdapter(runtime.opened, max_gen_toks)


class VLLMAdapter(Requests, VLLM):
    """lm-eval's model over an open vLLM engine."""

    def __init__(self, opened: VLLM, max_gen_toks: int | None) -> None:
        self.__dict__.update(vars(opened))  # the constructor of VLLM would open a second engine
        self.limit_answers(max_gen_toks)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = VLLM._loglikelihood_tokens(self, requests, disable_tqdm=True)
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers: list[str] = VLLM.generate_until(self, self.limit_requests(requests), disable_tqdm=True)
        return answers
