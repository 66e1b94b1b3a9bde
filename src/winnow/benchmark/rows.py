"""Scores lm-eval's requests in packed rows, which need no padding and compute each shared context once.

The choices of a question share its context. A row holds the context once and all choices after it; each choice attends to the
context and itself, at the positions that it has alone. A question of ARC-easy has 27 tokens and each of its four answers 4:
a packed row has 43 tokens instead of 127. The head computes logits only where a token is predicted.

`supports_packing` tests an architecture on a few tokens instead of looking it up in a list.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from winnow.model.adapter import base_model, virtual_tokens
from winnow.model.packed_attention import INTERFACE_ERRORS, Segment, Segments, segments_attention, use_attention

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation; neither is empty
Score = tuple[float, bool]  # log-likelihood of the continuation in nats, and whether greedy decoding gives it
NAME = "winnow_segments"
PROBE = (range(9, 20), range(2, 6)), ((3, 5, 7), (4,), (5, 3))  # contexts, and the continuations of each context


@dataclass
class Row:
    """A packed row of requests, one forward pass of the model.

    Attributes:
        ids: the token ids.
        positions: the position id of each token.
        segments: the contexts and continuations; each segment attends to itself and to one earlier segment.
        predictions: for each request its index, and the places in the row of the tokens that predict its continuation.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    predictions: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, ids: Sequence[int], first_position: int, context_span: tuple[int, int] = (0, 0)) -> range:
        """Appends a segment that also attends to the places `context_span`, and returns the places of the segment."""
        places = range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))
        self.segments.append(Segment(places.start, places.stop, *context_span))
        return places


def rows(requests: Sequence[Request], most_tokens: int) -> Iterator[Row]:
    """Packs the requests into rows of at most `most_tokens` tokens; a longer request gets a row of its own."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        groups[tuple(context)].append(number)
    row = Row()
    for context, numbers in groups.items():
        places = None
        for number in numbers:
            inputs = list(requests[number][1])[:-1]  # the last token is only predicted
            needed = len(inputs) + (0 if places else len(context))
            if row.ids and len(row.ids) + needed > most_tokens:
                yield row
                row, places = Row(), None
            places = places or row.add(context, 0)
            continuation = row.add(inputs, len(context), (places.start, places.stop)) if inputs else range(0)
            row.predictions.append((number, [places[-1], *continuation]))
    if row.ids:
        yield row


@torch.no_grad()
def scores(model: Any, requests: Sequence[Request], most_tokens: int) -> list[Score]:
    """Returns the score of each request; `model` is a causal language model of transformers that `supports_packing`."""
    results: list[Score] = [(0.0, False)] * len(requests)
    device = model.device
    with use_attention(base_model(model), NAME, segments_attention):
        for row in rows(requests, most_tokens):
            predicting = [place for _, places in row.predictions for place in places]
            logits_nv = model(
                input_ids=torch.tensor([row.ids], device=device),
                position_ids=torch.tensor([row.positions], device=device),
                segments=Segments(row.segments, device),
                use_cache=False,
                logits_to_keep=torch.tensor(predicting, device=device),
            ).logits[0]
            row_scores = _scores(logits_nv.float(), [requests[number][1] for number, _ in row.predictions])
            for (number, _), score in zip(row.predictions, row_scores, strict=True):
                results[number] = score
    return results


def _scores(logits_nv: torch.Tensor, continuations: Sequence[Sequence[int]]) -> list[Score]:
    targets_n = torch.tensor([i for c in continuations for i in c], device=logits_nv.device)
    chosen_n = logits_nv.gather(-1, targets_n[:, None])[:, 0] - logits_nv.logsumexp(-1)
    greedy_n = logits_nv.argmax(-1) == targets_n
    lengths = [len(c) for c in continuations]
    parts = zip(chosen_n.cpu().split(lengths), greedy_n.cpu().split(lengths), strict=True)
    return [(float(chosen.sum()), bool(greedy.all())) for chosen, greedy in parts]


@torch.no_grad()
def score_unpacked(model: Any, request: Request) -> Score:
    """Returns the score of one request by a plain forward pass: the reference of `scores`."""
    context, continuation = request
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    logits_tv = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :]
    return _scores(logits_tv.float(), [continuation])[0]


def supports_packing(model: Any) -> bool:
    """Checks that packed rows give a few requests the same scores as `score_unpacked`, apart from rounding.

    A second check changes the tokens of the first continuation. The scores of all other requests must stay exactly equal, since
    the same products of the same sizes are computed; this detects even the small effect of a short convolution.
    """
    if virtual_tokens(model) or "logits_to_keep" not in inspect.signature(base_model(model).forward).parameters:
        return False
    vocabulary = model.config.get_text_config().vocab_size
    contexts, continuations = ([[i % vocabulary for i in ids] for ids in part] for part in PROBE)
    requests: list[Request] = [(context, continuation) for context in contexts for continuation in continuations]
    (context, continuation), *other_requests = requests
    changed = [(context, [(i + 1) % vocabulary for i in continuation]), *other_requests]
    most_tokens = sum(len(ids) for request in requests for ids in request)
    try:
        packed, packed_changed = (scores(model, batch, most_tokens) for batch in (requests, changed))
    except INTERFACE_ERRORS:
        return False
    expected = [score_unpacked(model, request) for request in requests]
    close = all(
        abs(nats - reference) <= 0.02 * abs(reference)
        for (nats, _), (reference, _) in zip(packed, expected, strict=True)
    )
    return close and packed[1:] == packed_changed[1:]
