"""Formats the metrics of one evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from winnow.core.formats import human


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Returns a line for each figure: its value with unit, its standard error if there is one, and its source."""
    figures, sources = metrics["figures"], metrics["sources"]
    rows = []
    for name, value in figures.items():
        if name.endswith("_stderr"):
            continue
        error = figures.get(f"{name}_stderr")
        value_text = human(name, value) + (f" ± {error:.3f}" if error is not None else "")
        rows.append((name, value_text, sources.get(name, "measured")))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{name:<{widths[0]}}  {value_text:>{widths[1]}}  {source}" for name, value_text, source in rows]
    return "\n".join(lines)
