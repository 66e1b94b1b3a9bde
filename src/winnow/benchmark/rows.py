"""Requests of lm-eval in rows of text, nothing padded and no context read twice.

The choices of a question have its text in common. It lies in a row once, each choice after it; a choice sees that text and itself,
at the positions that it would have alone. A question of ARC-easy is 27 tokens and each of its four answers 4: these are 43
tokens instead of 127. The head makes logits only where a token is asked for.

Whether an architecture can be scored so is tried on a few tokens, not looked up in a list.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from winnow.model.adapter import base_model, virtual_tokens
from winnow.model.packed_attention import NOT_TOLD, Segment, Segments, attending, segments_attention

Request = tuple[Sequence[int], Sequence[int]]  # the ids of a context, and of its continuation; neither is empty
Score = tuple[float, bool]  # the continuation's log-likelihood in nats, and whether greedy decoding gives it
NAME = "winnow_segments"
TRIED = (range(9, 20), range(2, 6)), ((3, 5, 7), (4,), (5, 3))  # contexts, and continuations of each


@dataclass
class Row:
    """What is read at a time.

    Attributes:
        ids: of all tokens.
        positions: of each, as the model is told.
        segments: the parts, each seeing itself and an earlier one.
        asked: for each request, its number and the places of the tokens that predict its continuation.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, ids: Sequence[int], first_position: int, seen: tuple[int, int] = (0, 0)) -> range:
        """Appends a segment that sees the places `seen`, too; returns its own."""
        places = range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))
        self.segments.append(Segment(places.start, places.stop, *seen))
        return places


def rows(requests: Sequence[Request], most_tokens: int) -> Iterator[Row]:
    """The requests in rows of at most so many tokens, or of one request."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        groups[tuple(context)].append(number)
    row = Row()
    for context, numbers in groups.items():
        places = None
        for number in numbers:
            read = list(requests[number][1])[:-1]  # the last token is predicted alone
            needed = len(read) + (0 if places else len(context))
            if row.ids and len(row.ids) + needed > most_tokens:
                yield row
                row, places = Row(), None
            places = places or row.add(context, 0)
            own = row.add(read, len(context), (places.start, places.stop)) if read else range(0)
            row.asked.append((number, [places[-1], *own]))
    if row.ids:
        yield row


@torch.no_grad()
def scores(model: Any, requests: Sequence[Request], most_tokens: int) -> list[Score]:
    """The score of each request by `model`, a causal language model of transformers that `fits`."""
    found: list[Score] = [(0.0, False)] * len(requests)
    device = model.device
    with attending(base_model(model), NAME, segments_attention):
        for row in rows(requests, most_tokens):
            wanted = [place for _, places in row.asked for place in places]
            logits_nv = model(
                input_ids=torch.tensor([row.ids], device=device),
                position_ids=torch.tensor([row.positions], device=device),
                segments=Segments(row.segments, device),
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, device=device),
            ).logits[0]
            scored = _scores(logits_nv.float(), [requests[number][1] for number, _ in row.asked])
            for (number, _), score in zip(row.asked, scored, strict=True):
                found[number] = score
    return found


def _scores(logits_nv: torch.Tensor, continuations: Sequence[Sequence[int]]) -> list[Score]:
    targets_n = torch.tensor([i for c in continuations for i in c], device=logits_nv.device)
    chosen_n = logits_nv.gather(-1, targets_n[:, None])[:, 0] - logits_nv.logsumexp(-1)
    greedy_n = logits_nv.argmax(-1) == targets_n
    lengths = [len(c) for c in continuations]
    parts = zip(chosen_n.cpu().split(lengths), greedy_n.cpu().split(lengths), strict=True)
    return [(float(chosen.sum()), bool(greedy.all())) for chosen, greedy in parts]


@torch.no_grad()
def alone(model: Any, request: Request) -> Score:
    """What `scores` finds for a request, read by itself in the model's own way."""
    context, continuation = request
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    logits_tv = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :]
    return _scores(logits_tv.float(), [continuation])[0]


def fits(model: Any) -> bool:
    """Whether `model` gives a few requests in a row the scores that it gives each alone, but for rounding.

    What other words in the first choice do to the other requests is nothing at all, since the same products of the same sizes are
    computed: a short convolution may do little, and is found all the same.
    """
    if virtual_tokens(model) or "logits_to_keep" not in inspect.signature(base_model(model).forward).parameters:
        return False
    vocabulary = model.config.get_text_config().vocab_size
    contexts, continuations = ([[i % vocabulary for i in ids] for ids in part] for part in TRIED)
    requests: list[Request] = [(context, continuation) for context in contexts for continuation in continuations]
    (context, continuation), *others = requests
    changed = [(context, [(i + 1) % vocabulary for i in continuation]), *others]
    most_tokens = sum(len(ids) for request in requests for ids in request)
    try:
        found, beside = (scores(model, asked, most_tokens) for asked in (requests, changed))
    except NOT_TOLD:
        return False
    expected = [alone(model, request) for request in requests]
    close = all(abs(mine - its) <= 0.02 * abs(its) for (mine, _), (its, _) in zip(found, expected, strict=True))
    return close and found[1:] == beside[1:]
