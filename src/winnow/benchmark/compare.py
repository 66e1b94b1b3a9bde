"""Compares two models on the same items: counts the answers that flipped, and tests whether that is more than chance.

A paired comparison counts only the items on which the models differ. It needs about five times fewer items than a comparison of
two accuracies if the models agree on most items.

    python -m winnow.benchmark.compare outputs/evaluate/BASE outputs/evaluate/OTHER
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from winnow.benchmark.samples import Sample, read
from winnow.core.errors import UserError

Z = 1.959964  # 97.5% quantile of the normal distribution
ALL = "all"


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on one benchmark, or on all items together.

    Attributes:
        base_accuracy, accuracy: shares of right answers of the base model and of the other model.
        difference: `accuracy - base_accuracy`; `low` and `high` are its 95% interval.
        p_value: the p-value of McNemar's exact test that right->wrong and wrong->right are equally likely.
        lost, gained: items that went from right to wrong, and from wrong to right.
    """

    benchmark: str
    items: int
    base_accuracy: float
    accuracy: float
    difference: float
    low: float
    high: float
    p_value: float
    lost: int
    gained: int


def mcnemar(lost: int, gained: int) -> float:
    """Returns the two-sided exact p-value: a binomial test of `lost` among all flips at 1/2 (McNemar 1947; exact form)."""
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**flips)) if flips else 1.0


def interval(lost: int, gained: int, items: int) -> tuple[float, float]:
    """Returns the 95% interval of a difference of paired shares: Wald's interval with one flip added each way.

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", equation 2. Unlike the plain Wald interval, it keeps its coverage where flips are few.
    """
    minus, plus = (lost + 1) / (items + 2), (gained + 1) / (items + 2)
    centre = plus - minus
    half = Z * math.sqrt((plus + minus - centre**2) / (items + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def compare_outcomes(benchmark: str, base: Sequence[bool], other: Sequence[bool]) -> Comparison:
    """Compares two models' outcomes on the same items, in the same order."""
    if len(base) != len(other) or not base:
        raise ValueError(f"{len(base)} and {len(other)} outcomes cannot be paired")
    items = len(base)
    lost = sum(b and not o for b, o in zip(base, other, strict=True))
    gained = sum(o and not b for b, o in zip(base, other, strict=True))
    low, high = interval(lost, gained, items)
    return Comparison(
        benchmark, items, sum(base) / items, sum(other) / items, (gained - lost) / items, low, high,
        mcnemar(lost, gained), lost, gained,
    )  # fmt: skip


def compare(base: str | Path, other: str | Path) -> list[Comparison]:
    """Compares the items that both files have: one comparison per benchmark, and last one of all items together.

    Args:
        base, other: `samples.parquet` files, or the folders that hold them.

    Raises:
        UserError: a file holds no samples, no item is in both files, or an item has different prompts.
    """
    first, second = _by_item(read(base)), _by_item(read(other))
    common = [key for key in first if key in second]
    if not common:
        raise UserError(f"{base} and {other} have no item in common")
    outcomes: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    for key in common:
        a, b = first[key], second[key]
        if a.prompt_hash != b.prompt_hash:
            raise UserError(
                f"{base} and {other} asked an item of {a.benchmark} with different prompts, so their answers cannot be "
                "compared: run both with the same benchmark settings (num_fewshot, seed, version of lm-eval)"
            )
        for name in (a.benchmark, ALL):
            outcomes[name][0].append(bool(a.correct))
            outcomes[name][1].append(bool(b.correct))
    names = [name for name in outcomes if name != ALL]
    return [compare_outcomes(name, *outcomes[name]) for name in (*names, ALL)]


def _by_item(samples: Sequence[Sample]) -> Mapping[tuple[str, str], Sample]:
    """Returns the samples that are right or wrong, by benchmark and item."""
    return {(s.benchmark, s.doc_hash): s for s in samples if s.correct is not None}


def table(comparisons: Sequence[Comparison]) -> str:
    """Returns the comparisons as a text table."""
    lines = [
        f"{'benchmark':<20} {'items':>6} {'base':>7} {'other':>7} {'diff':>8} {'95% interval':>18} {'p':>8}  lost  gained"
    ]
    for c in comparisons:
        between = f"{c.low:+.4f}, {c.high:+.4f}"
        lines.append(
            f"{c.benchmark:<20} {c.items:>6} {c.base_accuracy:>7.4f} {c.accuracy:>7.4f} {c.difference:>+8.4f} "
            f"{between:>18} {c.p_value:>8.3g} {c.lost:>5} {c.gained:>7}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m winnow.benchmark.compare BASE OTHER   (samples.parquet files, or folders with one)")
    try:
        print(table(compare(sys.argv[1], sys.argv[2])))
    except UserError as mistake:
        sys.exit(str(mistake))
