"""Makes masks of the smallest scores in rows, matrices and N:M patterns; the masks are deterministic."""

from __future__ import annotations

import torch


def smallest(score_oi: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the mask [out, in] of the `sparsity` share of each row with the smallest scores, ties by position.

    If the share of a row is not a whole number, rows differ by one, so that the whole matrix has exactly that share.
    """
    rows, width = score_oi.shape[:-1].numel(), score_oi.shape[-1]
    ends = (torch.arange(rows + 1, dtype=torch.float64, device=score_oi.device) * (width * sparsity)).round().long()
    counts = ends.diff().view(*score_oi.shape[:-1], 1)
    ranked = torch.arange(width, device=score_oi.device) < counts
    mask = torch.zeros_like(score_oi, dtype=torch.bool)
    return mask.scatter_(-1, score_oi.argsort(dim=-1, stable=True), ranked)


def smallest_of_all(score: torch.Tensor, share: float) -> torch.Tensor:
    """Returns the mask of the `share` of all scores that are smallest, ties by position."""
    return smallest_count(score, round(score.numel() * share))


def smallest_count(score: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the mask of the `count` smallest of all scores, ties by position."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten().float()
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[: count - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view_as(score)


def group_of(pattern: str) -> tuple[int, int]:
    """Returns N and M of the pattern "N:M"."""
    zeros, group = (int(part) for part in pattern.split(":"))
    return zeros, group


def smallest_of_pattern(score_oi: torch.Tensor, pattern: str) -> torch.Tensor:
    """Returns the mask [out, in] of the N smallest scores of every M consecutive inputs, for `pattern` "N:M"."""
    zeros, group = group_of(pattern)
    return smallest(score_oi.unflatten(-1, (-1, group)), zeros / group).flatten(-2)
