"""Attention over documents that lie one after the other in a row, each seeing itself alone: no mask, no padding, no waste.

A row of T tokens in documents of lengths l costs sum(l^2) instead of T^2. On CUDA, in 16 bits, it is one call of torch's
variable-length flash attention; elsewhere one of `scaled_dot_product_attention` a document. transformers reaches it through
its attention interface, so that every architecture which uses that interface trains on packed rows:

    with packed(model):
        model(input_ids=ids_1t, position_ids=restarting_1t, cu_seqlens=boundaries)
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

NAME = "winnow_packed"
# from an attention that does not go through the interface, and so cannot be told where documents begin
NOT_TOLD = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def attention(
    module: nn.Module,
    query_bhtd: torch.Tensor,
    key_bktd: torch.Tensor,
    value_bktd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    longest: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document [boundaries[i], boundaries[i + 1]) of a single row; returns [1, T, H, D].

    Heads of keys and values are shared by groups of query heads where there are fewer of them. `sliding_window` is how many
    positions a token sees, itself among them; `softcap` as in Gemma-2 (arXiv:2408.00118, section 2); `longest` is the length of the
    longest document: a GPU is waited for in every layer where it has to be read from the boundaries.
    """
    row, dtype, device = [query_bhtd, key_bktd, value_bktd], query_bhtd.dtype, query_bhtd.device
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, query_bhtd.shape[2]], dtype=torch.int32, device=device)
    if _in_one_call(query_bhtd, softcap) and not dropout:
        q_thd, k_tkd, v_tkd = (x[0].transpose(0, 1) for x in row)
        return _varlen(q_thd, k_tkd, v_tkd, cu_seqlens, longest, scaling, sliding_window)[None], None
    if device.type == "cpu":
        # in 16 bits the backward pass of a processor's attention takes three times as long
        row = [x.float() for x in row]
    lengths = cu_seqlens.diff().tolist()
    with torch.autocast(device.type, enabled=False):
        # split, not sliced: the gradient of a slice is as long as the whole row, and there would be one a document
        documents = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        out = [document(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in documents]
    return torch.cat([x.transpose(1, 2) for x in out], dim=1).to(dtype), None


def document(
    q_htd: torch.Tensor,
    k_ktd: torch.Tensor,
    v_ktd: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of one document with itself; [1, H, T, D] from queries [1, H, T, D], keys and values [1, K, S, D].

    Where S is more than T, the queries are those of the last T positions.
    """
    length = k_ktd.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if window is None and softcap is None and q_htd.shape[2] == length:
        return F.scaled_dot_product_attention(
            q_htd, k_ktd, v_ktd, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
    ahead = torch.arange(length, device=q_htd.device)
    distance_tt = ahead[-q_htd.shape[2] :, None] - ahead[None]
    seen_tt = (distance_tt >= 0) & (distance_tt < (window or length))
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_htd, k_ktd, v_ktd, attn_mask=seen_tt, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    groups = q_htd.shape[1] // k_ktd.shape[1]
    k_htd, v_htd = (x.repeat_interleave(groups, 1) for x in (k_ktd, v_ktd))
    scores = (q_htd @ k_htd.mT) * (scaling if scaling is not None else q_htd.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen_tt, float("-inf")).softmax(-1, dtype=torch.float32).to(v_htd.dtype)
    return F.dropout(weights, dropout) @ v_htd


class Segment(NamedTuple):
    """A part of a row, [start, stop), each token of which sees those before it and all of an earlier part."""

    start: int
    stop: int
    seen_start: int = 0
    seen_stop: int = 0


class Segments:
    """The segments of a row, which cover it in order, with what attention needs to know of them on a device.

    Attributes:
        lengths: of each, in tokens.
        seen: of each, the tokens that its last one sees.
        places_s: of the keys that they see, one segment after the other.
        bounds: of their queries and of their keys, [segments + 1] each.
    """

    def __init__(self, parts: Sequence[Segment], device: torch.device) -> None:
        keys = [[*range(part.seen_start, part.seen_stop), *range(part.start, part.stop)] for part in parts]
        self.lengths, self.seen = [part.stop - part.start for part in parts], [len(places) for places in keys]
        self.places_s = torch.tensor([place for places in keys for place in places], device=device)
        self.bounds = [
            torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
            for sizes in (self.lengths, self.seen)
        ]


def segments_attention(
    module: nn.Module,
    query_bhtd: torch.Tensor,
    key_bktd: torch.Tensor,
    value_bktd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    segments: Segments,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the segments of a single row; returns [1, T, H, D]. Not for training."""
    k_bksd, v_bksd = key_bktd[:, :, segments.places_s], value_bktd[:, :, segments.places_s]
    if _in_one_call(query_bhtd, softcap):
        q_thd, k_skd, v_skd = (x[0].transpose(0, 1) for x in (query_bhtd, k_bksd, v_bksd))
        bounds, (most, most_seen) = segments.bounds, (max(segments.lengths), max(segments.seen))
        row = _varlen(q_thd, k_skd, v_skd, bounds[0], most, scaling, sliding_window, bounds[1], most_seen)
        return row[None], None
    split = query_bhtd.split(segments.lengths, 2), k_bksd.split(segments.seen, 2), v_bksd.split(segments.seen, 2)
    out = [document(q, k, v, scaling, 0.0, sliding_window, softcap) for q, k, v in zip(*split, strict=True)]
    return torch.cat([x.transpose(1, 2) for x in out], dim=1), None


def _in_one_call(query: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's variable-length attention can compute it."""
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and softcap is None


def _varlen(
    q_thd: torch.Tensor,
    k_tkd: torch.Tensor,
    v_tkd: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None,
    scaling: float | None,
    sliding_window: int | None,
    cu_seen: torch.Tensor | None = None,
    most_seen: int | None = None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared: dict[str, Any] = {}
    if q_thd.shape[1] != k_tkd.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            shared["enable_gqa"] = True
        else:  # torch 2.11 wants as many heads of keys and values as of queries
            groups = q_thd.shape[1] // k_tkd.shape[1]
            k_tkd, v_tkd = (x.repeat_interleave(groups, 1) for x in (k_tkd, v_tkd))
    longest = longest or int(cu_seqlens.diff().max())
    # to the left of a token that many positions, beside itself
    left = sliding_window - 1 if sliding_window is not None and sliding_window < (most_seen or longest) else -1
    out: Any = varlen_attn(
        q_thd.contiguous(),
        k_tkd.contiguous(),
        v_tkd.contiguous(),
        cu_seqlens,
        cu_seqlens if cu_seen is None else cu_seen,
        longest,
        most_seen or longest,
        scale=scaling,
        window_size=(left, 0),
        **shared,
    )
    return out  # type: ignore[no-any-return]


def packed(model: Any) -> contextlib.AbstractContextManager[None]:
    """Meanwhile the attention of `model` is that of packed rows."""
    return attending(model, NAME, attention)


@contextlib.contextmanager
def attending(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile the attention of `model` is `function`, which transformers knows by `name`."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
