"""Implements lm-eval's model interface over llama.cpp: log-likelihoods and greedy answers of a GGUF file, in this process.

The choices of a question share its tokens in the KV cache, so each question is computed once. Many answers are generated at a
time, and the next prompt takes the sequence of each answer that is finished.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from winnow.benchmark.transformers_adapter import Requests
from winnow.core.errors import UserError
from winnow.runtime.llama_cpp import Runtime, Token, log_softmax

MOST_SEQUENCES = 32  # sequences at a time: more gain little speed, and each takes its part of the KV cache
SHARED_TOKENS = 512  # KV cache cells that questions and choices are packed into: attention is computed over all


@dataclass
class Question:
    """A context and the continuations to score after it; `numbers` are the indices of the requests."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def branches(self) -> int:
        """The number of sequences: one for each continuation with tokens to compute (the last token needs none)."""
        return max(1, sum(len(c) > 1 for c in self.continuations))

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass
class Answer:
    """An answer that is being generated; `number` is the index of its request."""

    number: int
    prompt: list[int]
    max_tokens: int
    stops: list[str]
    generated: list[int] = field(default_factory=list)


def make_adapter(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> LlamaCppAdapter:
    """Returns the adapter over an open GGUF file."""
    return LlamaCppAdapter(runtime, tokenizer, batch_size, max_gen_toks)


class LlamaCppAdapter(Requests, TemplateLM):
    """lm-eval's model over an open GGUF file.

    Args:
        runtime: the open file.
        tokenizer: the tokenizer of the artifact's folder; the adapter uses a copy.
        batch_size: sequences at a time, `MOST_SEQUENCES` at most.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves that of each task.
    """

    # the functions that tokenize for transformers, and the attributes that they read
    tok_encode = HFLM.tok_encode
    tok_decode = HFLM.tok_decode
    prefix_token_id = HFLM.prefix_token_id
    custom_prefix_token_id = add_bos_token = None
    max_gen_toks = HFLM.max_gen_toks

    def __init__(self, runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None = None) -> None:
        super().__init__()
        assert runtime.context is not None
        self.runtime = runtime
        self.tokenizer = copy.deepcopy(tokenizer)
        self.max_length = runtime.context
        self.sequences = min(batch_size, MOST_SEQUENCES)
        self.end_ids = runtime.end_ids() | {self.eot_token_id}
        self.limit_answers(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        questions = self._group_by_context(requests)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        cells = max([SHARED_TOKENS, *(question.tokens for question in questions)])
        for pack in self._packs(questions, cells):
            tokens, targets = _pack_tokens(pack)
            scores: dict[int, list[tuple[float, bool]]] = defaultdict(list)
            row = 0
            for logits in self.runtime.cache(self.sequences, cells, shared=True).compute(tokens):
                log_probabilities, best = log_softmax(logits), logits.argmax(-1)
                for i in range(len(logits)):
                    for number, token in targets[row + i]:
                        scores[number].append((float(log_probabilities[i, token]), bool(best[i] == token)))
                row += len(logits)
            for number, token_scores in scores.items():
                results[number] = sum(p for p, _ in token_scores), all(greedy for _, greedy in token_scores)
        self.runtime.drop_cache()
        return results

    def _group_by_context(self, requests: list[Any]) -> list[Question]:
        """Groups the requests that share a context, as far as the sequences and the KV cache allow."""
        by_context: dict[tuple[int, ...], list[Question]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.max_length + 1) :]  # cut on the left, as for transformers
            context = ids[: len(ids) - len(continuation)]
            group = by_context[tuple(context)]
            full = group and (
                group[-1].branches >= self.sequences or group[-1].tokens + len(continuation) > SHARED_TOKENS
            )
            if not group or full:
                group.append(Question(context))
            group[-1].continuations.append(continuation)
            group[-1].numbers.append(number)
        return [question for group in by_context.values() for question in group]

    def _packs(self, questions: list[Question], cells: int) -> Iterator[list[Question]]:
        """Yields groups of questions that are computed together."""
        pack: list[Question] = []
        sequences = tokens = 0
        for question in questions:
            if pack and (sequences + question.branches > self.sequences or tokens + question.tokens > cells):
                yield pack
                pack, sequences, tokens = [], 0, 0
            pack.append(question)
            sequences, tokens = sequences + question.branches, tokens + question.tokens
        if pack:
            yield pack

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Returns greedy continuations, each up to its first stop sequence.

        Raises:
            UserError: a task asks for sampling.
        """
        waiting = deque(self._answer(number, request) for number, request in enumerate(self.limit_requests(requests)))
        if not waiting:
            return []
        texts = [""] * len(requests)
        length = max(len(answer.prompt) + answer.max_tokens for answer in waiting)
        cache = self.runtime.cache(min(self.sequences, len(waiting)), length)
        free = list(range(min(self.sequences, len(waiting))))
        active: dict[int, Answer] = {}  # answers by sequence number
        while waiting or active:
            tokens = [
                Token(
                    answer.generated[-1], len(answer.prompt) + len(answer.generated) - 1, (sequence,), needs_logits=True
                )
                for sequence, answer in active.items()
            ]
            while waiting and free:
                answer, sequence = waiting.popleft(), free.pop()
                active[sequence] = answer
                last = len(answer.prompt) - 1
                tokens += [Token(token, i, (sequence,), i == last) for i, token in enumerate(answer.prompt)]
            order = list(active)
            best = np.concatenate([logits.argmax(-1) for logits in cache.compute(tokens)])
            for sequence, token in zip(order, best, strict=True):
                answer = active[sequence]
                answer.generated.append(int(token))
                if self._is_done(answer):
                    texts[answer.number] = self._text(answer)
                    cache.forget(sequence)
                    free.append(sequence)
                    del active[sequence]
        self.runtime.drop_cache()
        return texts

    def _answer(self, number: int, request: Instance) -> Answer:
        prompt, gen_kwargs = request.args
        settings = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError("hardware.runtime=llama_cpp answers greedily, and this task samples; use transformers")
        max_tokens = int(settings["max_gen_toks"])
        stops = handle_stop_sequences(settings["until"], eos=self.tok_decode(self.eot_token_id, False))
        prompt_ids = self.tok_encode(prompt, left_truncate_len=self.max_length - max_tokens)
        return Answer(number, prompt_ids, max_tokens, stops)

    def _is_done(self, answer: Answer) -> bool:
        if len(answer.generated) >= answer.max_tokens or answer.generated[-1] in self.end_ids:
            return True
        # each token has at least one byte, so the last few contain any new stop sequence; the full text only confirms it
        tail = self.tok_decode(answer.generated[-max(len(stop.encode()) for stop in answer.stops) - 1 :])
        return any(stop in tail for stop in answer.stops) and any(
            stop in self.tok_decode(answer.generated) for stop in answer.stops
        )

    def _text(self, answer: Answer) -> str:
        text: str = postprocess_generated_text(self.tok_decode(answer.generated), answer.stops, think_end_token=None)
        return text


def _pack_tokens(pack: list[Question]) -> tuple[list[Token], list[list[tuple[int, int]]]]:
    """Returns the tokens to compute for some questions, and the targets of each token that gives logits.

    A target is a pair `(index of the request, token id)`. The targets of a request keep the order of its tokens.
    """
    tokens: list[Token] = []
    targets: list[list[tuple[int, int]]] = []
    sequence = 0
    for question in pack:
        sequences = tuple(range(sequence, sequence + question.branches))
        sequence += question.branches
        last = len(question.context) - 1
        tokens += [Token(token, i, sequences, i == last) for i, token in enumerate(question.context)]
        pairs = list(zip(question.numbers, question.continuations, strict=True))
        targets.append([(number, continuation[0]) for number, continuation in pairs])
        branches = iter(sequences)
        for number, continuation in pairs:
            branch = (next(branches),) if len(continuation) > 1 else ()
            for i, token in enumerate(continuation[:-1]):
                tokens.append(Token(token, last + 1 + i, branch, needs_logits=True))
                targets.append([(number, continuation[i + 1])])
    return tokens, targets
