"""Writes the report: one HTML file that needs no network, with all figures, failures and command lines of a study.

The table of trials is plain HTML, written here, so that it can be read without scripts; plotly draws the charts from the JSON in
the page. All text from trials (names, messages, command lines) is data: it is escaped everywhere, and a content security policy
allows only the scripts of this file, by their hashes, and no loading from anywhere.
The file is about 5 MB, nearly all of it plotly.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from winnow.core.files import atomic_write
from winnow.core.formats import Axis, axes_of, directions, plain, plain_lines
from winnow.core.types import Summary
from winnow.report import html_rows
from winnow.report.facts import (
    WITHIN_POINTS,
    base_of,
    best_within_points,
    counts,
    headline,
    payback,
    points,
    quality_of,
    ratio,
)

SCRIPTS = ("charts.js", "table.js")


def write_report(path: Path, summary: Summary) -> None:
    """Writes the report to `path` atomically: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        scratch.write_text(render(summary), encoding="utf-8", errors="replace")


def render(summary: Summary) -> str:
    """Returns the page as text."""
    from plotly.offline import get_plotlyjs

    axes = axes_of(summary)
    tally = counts(summary)
    scripts = [get_plotlyjs(), *(_resource(name) for name in SCRIPTS)]
    facts = [
        f"{tally['complete']} complete",
        f"{tally['stopped']} stopped early",
        f"{tally['failed']} failed",
        f"{tally['front']} on the front",
    ]
    return _fill(
        _resource("template.html"),
        {
            "policy": _content_security_policy(scripts),
            "title": escape(plain(summary.name)),
            "style": _resource("report.css"),
            "headline": escape(" ".join(filter(None, (headline(summary), payback(summary))))),
            "counts": escape(f"{tally['trials']} trial{'s' * (tally['trials'] != 1)}: {', '.join(facts)}"),
            "directions": escape(directions(axes)),
            "tiles": "\n".join(tiles(summary, axes)),
            "fingerprint": "\n".join(fingerprint_rows(summary.fingerprint)),
            "head": html_rows.head(axes),
            "rows": "\n".join(html_rows.body(summary, axes)),
            "failed": str(tally["failed"]),
            "front": str(tally["front"]),
            "trials": str(tally["trials"]),
            "data": script_json(chart_data(summary, axes)),
            "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        },
    )


def chart_data(summary: Summary, axes: Sequence[Axis]) -> dict[str, Any]:
    """Returns the data of the charts. Values are in the unit of each axis; `text` holds them as printed."""
    on_front = set(summary.front)
    base = base_of(summary)
    trials = []
    for trial in summary.trials:
        values = {a.name: trial.figures[a.name] for a in axes if math.isfinite(trial.figures.get(a.name, math.nan))}
        trials.append(
            {
                "number": trial.number,
                "strategy": plain(str(trial.strategy)),
                "complete": trial.complete,
                "stopped": trial.stopped,
                "reason": str(trial.reason or ""),
                "front": trial.number in on_front,
                "base": base is not None and trial.number == base.number,
                "values": {a.name: values[a.name] / a.factor for a in axes if a.name in values},
                "text": {a.name: a.show(values[a.name]) for a in axes if a.name in values},
            }
        )
    axes_json = [
        {"name": a.name, "label": a.label, "title": a.title, "better": a.better, "maximize": a.maximize} for a in axes
    ]
    volumes = [v if math.isfinite(v) else None for v in summary.hypervolume]
    return {"study": plain(summary.name), "axes": axes_json, "trials": trials, "hypervolume": volumes}


def tiles(summary: Summary, axes: Sequence[Axis]) -> list[str]:
    """Returns the tiles: the size of the front and, for each objective to minimise, the best that keeps the score."""
    tally = counts(summary)
    reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in tally["failed_by_reason"].items())
    tiles_html = [
        _tile(
            "On the front",
            str(tally["front"]),
            f"of {tally['complete']} complete trials",
            escape(f"{tally['failed']} failed: {reasons}" if reasons else "none failed"),
        )
    ]
    base, quality = base_of(summary), quality_of(summary)
    if base is None or quality is None:
        return tiles_html
    for axis in axes[: len(summary.objectives)]:
        best = best_within_points(summary, axis.name) if axis.maximize is False else None
        if best is None:
            continue
        value = best.figures[axis.name]
        share = ratio(value, base.figures.get(axis.name))
        change = points(quality, best.figures.get(quality.name), base.figures.get(quality.name))
        note = f'<a href="#trial-{best.number}">trial {best.number}</a>, {escape(plain(str(best.strategy)))}'
        if change is not None:
            note += f", {escape(quality.name)} " + f"{change:+.1f}&nbsp;points".replace("-", "&minus;")
        times = f"{share:.2f}× the base model’s" if share is not None else ""
        tiles_html.append(_tile(f"lowest {axis.label} within {WITHIN_POINTS:g} points", axis.show(value), times, note))
    return tiles_html


def _tile(label: str, value: str, share: str, note_html: str) -> str:
    return (
        f'<li class="tile"><p class="tile-label">{escape(label)}</p><p class="tile-value">{escape(value)}</p>'
        f'<p class="tile-share">{escape(share)}</p><p class="tile-note">{note_html}</p></li>'
    )


def fingerprint_rows(fingerprint: Any, prefix: str = "") -> list[str]:
    """Returns the fingerprint as rows of a description list; nested mappings get dotted names."""
    rows = []
    for key, value in fingerprint.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            rows += fingerprint_rows(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            rows.append(f"<div><dt>{escape(plain(name))}</dt><dd>{escape(plain_lines(text))}</dd></div>")
    return rows


def script_json(data: Any) -> str:
    """Returns JSON for a script element, in which no character can end the element or start another one."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content_security_policy(scripts: Sequence[str]) -> str:
    """Returns the content security policy: only these scripts may run, and no request is allowed.

    plotly writes styles as it draws (`unsafe-inline` of styles) and compiles its 3-D shaders' bindings (`unsafe-eval`).
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'unsafe-eval' {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("winnow.report").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    """Replaces each `{{name}}` of the template by its value, in one pass: inserted text is not expanded again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], template)
