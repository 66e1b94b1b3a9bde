"""lm-eval's own model of vLLM, with the token ids and limits of the other runtimes."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM

from winnow.benchmark.transformers_adapter import Requests
from winnow.runtime.vllm import Runtime


def over(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> VLLMAdapter:
    """The adapter over a model that is open; the tokenizer is the runtime's own, and vLLM fills its batches itself."""
    return VLLMAdapter(runtime.opened, max_gen_toks)


class VLLMAdapter(Requests, VLLM):
    """lm-eval's model over an engine that is open."""

    def __init__(self, opened: VLLM, max_gen_toks: int | None) -> None:
        self.__dict__.update(vars(opened))  # its own constructor would open a second engine
        self.limit_answers(max_gen_toks)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = VLLM._loglikelihood_tokens(self, requests, disable_tqdm=True)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers: list[str] = VLLM.generate_until(self, self.limited(requests), disable_tqdm=True)
        return answers
