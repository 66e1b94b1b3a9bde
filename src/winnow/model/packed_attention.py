"""Computes attention over packed rows, in which each document attends only to itself, without a mask or padding.

A row of T tokens in documents of lengths l costs sum(l^2) instead of T^2. On CUDA, in 16 bits, the row takes one call of torch's
variable-length flash attention; elsewhere each document takes one call of `scaled_dot_product_attention`. transformers calls the
function through its attention interface, so that every architecture which uses that interface can train on packed rows:

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
# errors of an architecture that bypasses the attention interface and so does not receive the document boundaries
INTERFACE_ERRORS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


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
    """Computes causal attention inside each document [cu_seqlens[i], cu_seqlens[i + 1]) of a single row; returns [1, T, H, D].

    Groups of query heads share a head of keys and values if there are fewer of those. `sliding_window` is the number of positions
    that a token attends to, including itself; `softcap` is that of Gemma-2 (arXiv:2408.00118, section 2). `longest` is the length
    of the longest document: without it, every layer waits for the GPU to read it from the boundaries.
    """
    row, dtype, device = [query_bhtd, key_bktd, value_bktd], query_bhtd.dtype, query_bhtd.device
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, query_bhtd.shape[2]], dtype=torch.int32, device=device)
    if _supports_varlen(query_bhtd, softcap) and not dropout:
        q_thd, k_tkd, v_tkd = (x[0].transpose(0, 1) for x in row)
        return _varlen(q_thd, k_tkd, v_tkd, cu_seqlens, longest, scaling, sliding_window)[None], None
    if device.type == "cpu":
        # on a CPU, the backward pass of attention takes three times as long in 16 bits
        row = [x.float() for x in row]
    lengths = cu_seqlens.diff().tolist()
    with torch.autocast(device.type, enabled=False):
        # split, not sliced: the gradient of each slice would be as long as the whole row
        documents = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        out = [document_attention(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in documents]
    return torch.cat([x.transpose(1, 2) for x in out], dim=1).to(dtype), None


def document_attention(
    q_htd: torch.Tensor,
    k_ktd: torch.Tensor,
    v_ktd: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Computes causal attention within one document: [1, H, T, D] from queries [1, H, T, D], keys and values [1, K, S, D].

    If S is greater than T, the queries are those of the last T positions.
    """
    length = k_ktd.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if window is None and softcap is None and q_htd.shape[2] == length:
        return F.scaled_dot_product_attention(
            q_htd, k_ktd, v_ktd, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
    positions = torch.arange(length, device=q_htd.device)
    distance_tt = positions[-q_htd.shape[2] :, None] - positions[None]
    visible_tt = (distance_tt >= 0) & (distance_tt < (window or length))
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_htd, k_ktd, v_ktd, attn_mask=visible_tt, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    groups = q_htd.shape[1] // k_ktd.shape[1]
    k_htd, v_htd = (x.repeat_interleave(groups, 1) for x in (k_ktd, v_ktd))
    scores = (q_htd @ k_htd.mT) * (scaling if scaling is not None else q_htd.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible_tt, float("-inf")).softmax(-1, dtype=torch.float32).to(v_htd.dtype)
    return F.dropout(weights, dropout) @ v_htd


class Segment(NamedTuple):
    """A part [start, stop) of a row, whose tokens attend to the part up to themselves and to all of an earlier part."""

    start: int
    stop: int
    visible_start: int = 0
    visible_stop: int = 0


class Segments:
    """The segments of a row, which cover it in order, as attention needs them on a device.

    Attributes:
        lengths: tokens of each segment.
        visible_lengths: tokens that the last token of each segment attends to.
        key_positions_s: positions of the keys that the segments attend to, one segment after the other.
        bounds: boundaries of the queries and of the keys of the segments, [segments + 1] each.
    """

    def __init__(self, parts: Sequence[Segment], device: torch.device) -> None:
        keys = [[*range(part.visible_start, part.visible_stop), *range(part.start, part.stop)] for part in parts]
        self.lengths = [part.stop - part.start for part in parts]
        self.visible_lengths = [len(positions) for positions in keys]
        self.key_positions_s = torch.tensor([position for positions in keys for position in positions], device=device)
        self.bounds = [
            torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
            for sizes in (self.lengths, self.visible_lengths)
        ]


def segments_attention(
    module: nn.Module,
    query_bhtd: torch.Tensor,
    key_bktd: torch.Tensor,
    value_bktd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention of the segments of a single row; returns [1, T, H, D]. It is not for training."""
    k_bksd, v_bksd = key_bktd[:, :, segments.key_positions_s], value_bktd[:, :, segments.key_positions_s]
    if _supports_varlen(query_bhtd, softcap):
        q_thd, k_skd, v_skd = (x[0].transpose(0, 1) for x in (query_bhtd, k_bksd, v_bksd))
        bounds, (longest, longest_keys) = segments.bounds, (max(segments.lengths), max(segments.visible_lengths))
        out_thd = _varlen(q_thd, k_skd, v_skd, bounds[0], longest, scaling, sliding_window, bounds[1], longest_keys)
        return out_thd[None], None
    parts = (
        query_bhtd.split(segments.lengths, 2),
        k_bksd.split(segments.visible_lengths, 2),
        v_bksd.split(segments.visible_lengths, 2),
    )
    out = [document_attention(q, k, v, scaling, 0.0, sliding_window, softcap) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([x.transpose(1, 2) for x in out], dim=1), None


def _supports_varlen(query: torch.Tensor, softcap: float | None) -> bool:
    """Returns whether torch's variable-length attention supports the inputs."""
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and softcap is None


def _varlen(
    q_thd: torch.Tensor,
    k_tkd: torch.Tensor,
    v_tkd: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None,
    scaling: float | None,
    sliding_window: int | None,
    cu_keys: torch.Tensor | None = None,
    longest_keys: int | None = None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if q_thd.shape[1] != k_tkd.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11 requires as many heads of keys and values as of queries
            groups = q_thd.shape[1] // k_tkd.shape[1]
            k_tkd, v_tkd = (x.repeat_interleave(groups, 1) for x in (k_tkd, v_tkd))
    longest = longest or int(cu_seqlens.diff().max())
    # number of positions to the left of a token, without itself
    left = sliding_window - 1 if sliding_window is not None and sliding_window < (longest_keys or longest) else -1
    out: Any = varlen_attn(
        q_thd.contiguous(),
        k_tkd.contiguous(),
        v_tkd.contiguous(),
        cu_seqlens,
        cu_seqlens if cu_keys is None else cu_keys,
        longest,
        longest_keys or longest,
        scale=scaling,
        window_size=(left, 0),
        **options,
    )
    return out  # type: ignore[no-any-return]


def packed(model: Any) -> contextlib.AbstractContextManager[None]:
    """Returns a context manager in which `model` uses the attention for packed rows."""
    return use_attention(model, NAME, attention)


@contextlib.contextmanager
def use_attention(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Makes `model` use `function` as its attention inside the block, registered with transformers as `name`."""
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
