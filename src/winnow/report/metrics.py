"""The metrics of one evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from winnow.core.formats import human


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Each figure with its unit, its standard error where it has one, and its source."""
    figures, sources = metrics["figures"], metrics["sources"]
    rows = []
    for name, value in figures.items():
        if name.endswith("_stderr"):
            continue
        error = figures.get(f"{name}_stderr")
        shown = human(name, value) + (f" ± {error:.3f}" if error is not None else "")
        rows.append((name, shown, sources.get(name, "measured")))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{name:<{widths[0]}}  {shown:>{widths[1]}}  {source}" for name, shown, source in rows]
    return "\n".join(lines)
