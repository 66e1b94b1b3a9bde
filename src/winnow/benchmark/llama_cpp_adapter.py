"""lm-eval's model over llama.cpp: log-likelihoods and greedy answers of a GGUF file, in this process.

The choices of a question share its tokens in the cache, so a question is computed once. Answers are generated many at a time,
and a new question takes the place of each that is done.
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

MOST_SEQUENCES = 32  # at a time: more gain little speed, and each takes its part of the cache
SHARED_TOKENS = 512  # of a cache that questions and their choices are packed into: attention is computed over all of it


@dataclass
class Question:
    """A context and the continuations to score after it; `numbers` are those of the requests."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def branches(self) -> int:
        """Sequences it takes: one for each continuation whose tokens, but the last, must be computed."""
        return max(1, sum(len(c) > 1 for c in self.continuations))

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@dataclass
class Answer:
    """A text being generated."""

    number: int
    prompt: list[int]
    most_tokens: int
    stops: list[str]
    made: list[int] = field(default_factory=list)


def over(runtime: Runtime, tokenizer: Any, batch_size: int, max_gen_toks: int | None) -> LlamaCppAdapter:
    """The adapter over a file that is open."""
    return LlamaCppAdapter(runtime, tokenizer, batch_size, max_gen_toks)


class LlamaCppAdapter(Requests, TemplateLM):
    """An open GGUF file as lm-eval sees it.

    Args:
        runtime: the open file.
        tokenizer: of the artifact's folder; a copy of it is used.
        batch_size: sequences at a time, `MOST_SEQUENCES` at most.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves that of each task.
    """

    # the very functions that tokenise for transformers, and what they read
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
        self.ends = runtime.end_ids() | {self.eot_token_id}
        self.limit_answers(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        questions = self._questions(requests)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        cells = max([SHARED_TOKENS, *(question.tokens for question in questions)])
        for pack in self._packs(questions, cells):
            tokens, asked = _lay_out(pack)
            scores: dict[int, list[tuple[float, bool]]] = defaultdict(list)
            row = 0
            for logits in self.runtime.cache(self.sequences, cells, shared=True).compute(tokens):
                probabilities, best = log_softmax(logits), logits.argmax(-1)
                for i in range(len(logits)):
                    for number, token in asked[row + i]:
                        scores[number].append((float(probabilities[i, token]), bool(best[i] == token)))
                row += len(logits)
            for number, tokens_of_it in scores.items():
                found[number] = sum(p for p, _ in tokens_of_it), all(greedy for _, greedy in tokens_of_it)
        self.runtime.drop_cache()
        return found

    def _questions(self, requests: list[Any]) -> list[Question]:
        """Requests of one context together, as far as the sequences and the cache suffice for them."""
        by_context: dict[tuple[int, ...], list[Question]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]  # too long: cut on the left, as for transformers
            context = kept[: len(kept) - len(continuation)]
            mine = by_context[tuple(context)]
            full = mine and (mine[-1].branches >= self.sequences or mine[-1].tokens + len(continuation) > SHARED_TOKENS)
            if not mine or full:
                mine.append(Question(context))
            mine[-1].continuations.append(continuation)
            mine[-1].numbers.append(number)
        return [question for questions in by_context.values() for question in questions]

    def _packs(self, questions: list[Question], cells: int) -> Iterator[list[Question]]:
        """Questions that are computed at a time."""
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
        """Greedy continuations, each up to its first stop sequence.

        Raises:
            UserError: a task asks for sampling.
        """
        waiting = deque(self._answer(number, request) for number, request in enumerate(self.limited(requests)))
        if not waiting:
            return []
        texts = [""] * len(requests)
        length = max(len(answer.prompt) + answer.most_tokens for answer in waiting)
        cache = self.runtime.cache(min(self.sequences, len(waiting)), length)
        free = list(range(min(self.sequences, len(waiting))))
        active: dict[int, Answer] = {}  # by sequence
        while waiting or active:
            tokens = [
                Token(answer.made[-1], len(answer.prompt) + len(answer.made) - 1, (sequence,), wanted=True)
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
                answer.made.append(int(token))
                if self._is_done(answer):
                    texts[answer.number] = self._text(answer)
                    cache.forget(sequence)
                    free.append(sequence)
                    del active[sequence]
        self.runtime.drop_cache()
        return texts

    def _answer(self, number: int, request: Instance) -> Answer:
        prompt, asked = request.args
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError("hardware.runtime=llama_cpp answers greedily, and this task samples; use transformers")
        most = int(settings["max_gen_toks"])
        stops = handle_stop_sequences(settings["until"], eos=self.tok_decode(self.eot_token_id, False))
        return Answer(number, self.tok_encode(prompt, left_truncate_len=self.max_length - most), most, stops)

    def _is_done(self, answer: Answer) -> bool:
        if len(answer.made) >= answer.most_tokens or answer.made[-1] in self.ends:
            return True
        # no token is of no byte, so the last few hold any stop sequence; the whole text is only read to make sure
        tail = self.tok_decode(answer.made[-max(len(stop.encode()) for stop in answer.stops) - 1 :])
        return any(stop in tail for stop in answer.stops) and any(
            stop in self.tok_decode(answer.made) for stop in answer.stops
        )

    def _text(self, answer: Answer) -> str:
        text: str = postprocess_generated_text(self.tok_decode(answer.made), answer.stops, think_end_token=None)
        return text


def _lay_out(pack: list[Question]) -> tuple[list[Token], list[list[tuple[int, int]]]]:
    """The tokens to compute for questions, and for each whose logits are wanted what they are asked for.

    That is pairs `(number of the request, token)`. A request's tokens are asked for in their order.
    """
    tokens: list[Token] = []
    asked: list[list[tuple[int, int]]] = []
    sequence = 0
    for question in pack:
        mine = tuple(range(sequence, sequence + question.branches))
        sequence += question.branches
        last = len(question.context) - 1
        tokens += [Token(token, i, mine, i == last) for i, token in enumerate(question.context)]
        pairs = list(zip(question.numbers, question.continuations, strict=True))
        asked.append([(number, continuation[0]) for number, continuation in pairs])
        branch = iter(mine)
        for number, continuation in pairs:
            own = (next(branch),) if len(continuation) > 1 else ()
            for i, token in enumerate(continuation[:-1]):
                tokens.append(Token(token, last + 1 + i, own, wanted=True))
                asked.append([(number, continuation[i + 1])])
    return tokens, asked
