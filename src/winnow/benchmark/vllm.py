"""lm-eval's own model of vLLM, with the token ids and limits of the other runtimes."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM

from winnow.benchmark.adapter import Requests


class VLLMAdapter(Requests, VLLM):
    """Opens a model in vLLM; the arguments are those of lm-eval's class. `limit_answers` comes before any request."""

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = VLLM._loglikelihood_tokens(self, requests, disable_tqdm=True)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers: list[str] = VLLM.generate_until(self, self.limited(requests), disable_tqdm=True)
        return answers
