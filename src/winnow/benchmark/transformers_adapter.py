"""Wraps lm-eval's transformers model, without its progress bars and its duplicate work.

lm-eval scores each choice of a question by itself. This adapter scores equal requests once (TruthfulQA's two tasks share
choices), computes the context that choices share once (`winnow.benchmark.rows`), and tokenizes all texts in one call instead of
three per text. Token ids and formulas are lm-eval's; rounding may differ.
`Requests` is the base class of the adapters of all runtimes, so that every runtime reads the same token ids.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from winnow.benchmark import rows
from winnow.model.adapter import virtual_tokens
from winnow.runtime.transformers import Runtime

LOGITS_BYTES = 2**30  # size of the float32 logits of one batch; lm-eval keeps a second copy
TOKENS = 64  # tokens of a packed row, per prompt of a batch


class Requests:
    """Tokenizes lm-eval's requests and returns their scores; mixed into a subclass of lm-eval's `TemplateLM`."""

    tokenizer: Any
    max_length: int
    max_gen_toks: int
    prefix_token_id: int
    max_answer_tokens: int
    tok_encode: Callable[..., list[int]]
    _encode_pair: Callable[[str, str], tuple[list[int], list[int]]]
    _loglikelihood_tokens: Callable[..., list[tuple[float, bool]]]

    def limit_answers(self, max_gen_toks: int | None) -> None:
        """Limits answers to `max_gen_toks` tokens, and to half of the context: the other half is for the question."""
        self.max_answer_tokens = min(max_gen_toks or self.max_length, self.max_length // 2)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns `(log-likelihood in nats, whether greedy decoding gives it)` of each `(context, continuation)`."""
        pairs = [request.args for request in requests]
        unique = list(dict.fromkeys(pairs))
        encoded = self._encode_pairs(unique)
        tokenized = [(pair, *tokens) for pair, tokens in zip(unique, encoded, strict=True)]
        scores = dict(zip(unique, self._loglikelihood_tokens(tokenized, disable_tqdm=True), strict=True))
        return [scores[pair] for pair in pairs]

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Returns the token ids of contexts and continuations, split at the same token as by lm-eval's `_encode_pair`."""
        if any(not context for context, _ in pairs) or not getattr(self.tokenizer, "is_fast", False):
            return [self._encode_single(context, continuation) for context, continuation in pairs]
        stripped = []
        for context, continuation in pairs:  # trailing spaces belong to the continuation's first token
            head = context.rstrip()
            stripped.append((head, context[len(head) :] + continuation))
        contexts = list(dict.fromkeys(context for context, _ in stripped))
        context_ids = dict(zip(contexts, self.tokenizer(contexts)["input_ids"], strict=True))
        full_ids = self.tokenizer([context + continuation for context, continuation in stripped])["input_ids"]
        return [
            (list(context_ids[context]), ids[len(context_ids[context]) :])
            for (context, _), ids in zip(stripped, full_ids, strict=True)
        ]

    def _encode_single(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            context_ids, continuation_ids = self._encode_pair(context, continuation)
            return context_ids, continuation_ids
        return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood in nats of each text after the prefix token; every token is predicted once.

        A request is `(text,)` or `(text, window)`: at most `window` tokens are predicted together, and no token sees those before
        its window. Unlike in lm-eval, the `<bos>` that some tokenizers put before each text is not predicted.
        """
        windows: list[Any] = []
        counts = []
        for text, *window in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=min([self.max_length, *window]),
                context_len=1,
            )
            disjoint = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += disjoint
            counts.append(len(disjoint))
        scores = iter(self._window_scores(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _window_scores(self, windows: list[Any]) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens(windows, disable_tqdm=True)

    def count_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text that are predicted."""
        return len(self.tok_encode(text, add_special_tokens=False))

    def limit_requests(self, requests: list[Instance]) -> list[Instance]:
        """Limits the answers of requests to `max_answer_tokens`, in place, and returns the requests."""
        for request in requests:
            settings = request.args[1]
            settings["max_gen_toks"] = min(settings.get("max_gen_toks", self.max_gen_toks), self.max_answer_tokens)
        return requests


def make_adapter(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> Adapter:
    """Returns the adapter over an open model."""
    return Adapter(runtime.model, tokenizer, batch_size, max_gen_toks)


class Adapter(Requests, HFLM):
    """lm-eval's model over a transformers model in memory.

    Args:
        model: a causal language model of transformers, in evaluation mode; it is not changed.
        tokenizer: the model's tokenizer; the adapter uses a copy.
        batch_size: prompts at a time; a packed row has `TOKENS` times as many tokens. Keep it fixed, since it moves scores by
            rounding.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves that of each task.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_gen_toks: int | None = None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_batch_size=None,
        )
        soft_prompt_tokens = virtual_tokens(model)
        if soft_prompt_tokens:
            self._max_length = self.max_length - soft_prompt_tokens
        self.limit_answers(max_gen_toks)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        scores: dict[int, tuple[float, bool]] = {}
        max_packed = self.max_length + 1 if self._packs_rows else 0  # lm-eval cuts requests that exceed the context
        packed = [n for n, (_, context, rest) in enumerate(requests) if len(context) + len(rest) <= max_packed]
        if packed:
            row_tokens = min(TOKENS * self.batch_size, LOGITS_BYTES // (4 * self.vocab_size))
            scores |= zip(packed, rows.scores(self.model, [requests[n][1:] for n in packed], row_tokens), strict=True)
        padded = [n for n in range(len(requests)) if n not in scores]
        if padded:
            lm_eval_scores = HFLM._loglikelihood_tokens(self, [requests[n] for n in padded], True, override_bs)
            scores |= zip(padded, lm_eval_scores, strict=True)
        return [scores[n] for n in range(len(requests))]

    @functools.cached_property
    def _packs_rows(self) -> bool:
        return rows.supports_packing(self.model)

    def _window_scores(self, windows: list[Any]) -> list[tuple[float, bool]]:
        """Scores windows as `_loglikelihood_tokens` does, in smaller batches where the logits of long texts would not fit."""
        if self._packs_rows:
            return self._loglikelihood_tokens(windows)
        lengths = [len(context) + len(continuation) for _, context, continuation in windows]
        fitting = max(1, LOGITS_BYTES // (4 * max(lengths) * self.vocab_size))
        if fitting >= self.batch_size:
            return self._loglikelihood_tokens(windows)
        results = [(0.0, False)] * len(windows)
        order = sorted(range(len(windows)), key=lambda number: -lengths[number])  # similar lengths need little padding
        for batch in (order[start : start + fitting] for start in range(0, len(order), fitting)):
            scores = self._loglikelihood_tokens([windows[number] for number in batch])
            for number, score in zip(batch, scores, strict=True):
                results[number] = score
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Returns greedy continuations, each up to its first stop sequence."""
        answers: list[str] = HFLM.generate_until(self, self.limit_requests(requests), disable_tqdm=True)
        return answers
