"""lm-eval's own model of transformers, made quiet, and spared work that it would do twice.

lm-eval scores each choice of a question by itself; here equal requests (the choices that TruthfulQA's two tasks share) are
scored once, the text that choices have in common is read once (`winnow.benchmark.rows`), and texts are tokenised in one call
instead of three for each. The tokens and what is computed of them are lm-eval's; rounding may differ.
`Requests` is what the models of all runtimes have in common: whatever serves a model, it is shown the same token ids.
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

LOGITS_BYTES = 2**30  # in float32, of what is scored together; lm-eval keeps a second copy
TOKENS = 64  # in a row, for each prompt of a batch


class Requests:
    """From lm-eval's requests to token ids and back, for a subclass of lm-eval's `TemplateLM` with a tokenizer."""

    tokenizer: Any
    max_length: int
    max_gen_toks: int
    prefix_token_id: int
    most_tokens: int  # of an answer
    tok_encode: Callable[..., list[int]]
    _encode_pair: Callable[[str, str], tuple[list[int], list[int]]]
    _loglikelihood_tokens: Callable[..., list[tuple[float, bool]]]

    def limit_answers(self, max_gen_toks: int | None) -> None:
        self.most_tokens = min(max_gen_toks or self.max_length, self.max_length // 2)  # half is kept for the question

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """`(log-likelihood in nats, whether greedy decoding gives it)` of each `(context, continuation)`."""
        pairs = [request.args for request in requests]
        unique = list(dict.fromkeys(pairs))
        encoded = self._encode_pairs(unique)
        whole = [(pair, *tokens) for pair, tokens in zip(unique, encoded, strict=True)]
        found = dict(zip(unique, self._loglikelihood_tokens(whole, disable_tqdm=True), strict=True))
        return [found[pair] for pair in pairs]

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Token ids of contexts and continuations, split where lm-eval's `_encode_pair` splits them."""
        if any(not context for context, _ in pairs) or not getattr(self.tokenizer, "is_fast", False):
            return [self._encode_one(context, continuation) for context, continuation in pairs]
        moved = []
        for context, continuation in pairs:  # trailing spaces belong to the continuation's first token
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + continuation))
        contexts = list(dict.fromkeys(context for context, _ in moved))
        starts = dict(zip(contexts, self.tokenizer(contexts)["input_ids"], strict=True))
        wholes = self.tokenizer([context + continuation for context, continuation in moved])["input_ids"]
        return [
            (list(starts[context]), whole[len(starts[context]) :])
            for (context, _), whole in zip(moved, wholes, strict=True)
        ]

    def _encode_one(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            start, rest = self._encode_pair(context, continuation)
            return start, rest
        return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text after the prefix token, every token of it predicted once.

        A request is `(text,)` or `(text, window)`: at most `window` tokens are predicted together, and none sees those before.
        Unlike lm-eval's, a tokenizer that puts `<bos>` before each text does not have that token predicted, too.
        """
        windows: list[Any] = []
        counts = []
        for text, *window in (request.args for request in requests):
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=min([self.max_length, *window]),
                context_len=1,
            )
            mine = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._window_scores(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _window_scores(self, windows: list[Any]) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens(windows, disable_tqdm=True)

    def count_tokens(self, text: str) -> int:
        """How many tokens of a text are predicted."""
        return len(self.tok_encode(text, add_special_tokens=False))

    def limited(self, requests: list[Instance]) -> list[Instance]:
        """The requests, their answers limited to `most_tokens`."""
        for request in requests:
            settings = request.args[1]
            settings["max_gen_toks"] = min(settings.get("max_gen_toks", self.max_gen_toks), self.most_tokens)
        return requests


def over(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> Adapter:
    """The adapter over a model that is open."""
    return Adapter(runtime.model, tokenizer, batch_size, max_gen_toks)


class Adapter(Requests, HFLM):
    """A model in memory as lm-eval sees it.

    Args:
        model: a transformers causal language model; it is left as it is, in evaluation mode.
        tokenizer: of that model; a copy of it is used.
        batch_size: prompts at a time, and of what is read in rows `TOKENS` times as many tokens. Fixed: it moves scores by
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
        taken = virtual_tokens(model)
        if taken:
            self._max_length = self.max_length - taken
        self.limit_answers(max_gen_toks)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        most = self.max_length + 1 if self._in_rows else 0  # lm-eval cuts what is longer than the model can read
        short = [n for n, (_, context, rest) in enumerate(requests) if len(context) + len(rest) <= most]
        if short:
            most_tokens = min(TOKENS * self.batch_size, LOGITS_BYTES // (4 * self.vocab_size))
            found |= zip(short, rows.scores(self.model, [requests[n][1:] for n in short], most_tokens), strict=True)
        others = [n for n in range(len(requests)) if n not in found]
        if others:
            scored = HFLM._loglikelihood_tokens(self, [requests[n] for n in others], True, override_bs)
            found |= zip(others, scored, strict=True)
        return [found[n] for n in range(len(requests))]

    @functools.cached_property
    def _in_rows(self) -> bool:
        return rows.fits(self.model)

    def _window_scores(self, windows: list[Any]) -> list[tuple[float, bool]]:
        """As `_loglikelihood_tokens`, with fewer windows at a time where their logits would not fit: texts are long."""
        if self._in_rows:
            return self._loglikelihood_tokens(windows)
        lengths = [len(context) + len(continuation) for _, context, continuation in windows]
        fitting = max(1, LOGITS_BYTES // (4 * max(lengths) * self.vocab_size))
        if fitting >= self.batch_size:
            return self._loglikelihood_tokens(windows)
        found = [(0.0, False)] * len(windows)
        order = sorted(range(len(windows)), key=lambda number: -lengths[number])  # so that little is padded
        for batch in (order[start : start + fitting] for start in range(0, len(order), fitting)):
            scores = self._loglikelihood_tokens([windows[number] for number in batch])
            for number, score in zip(batch, scores, strict=True):
                found[number] = score
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, each up to its first stop sequence."""
        answers: list[str] = HFLM.generate_until(self, self.limited(requests), disable_tqdm=True)
        return answers
