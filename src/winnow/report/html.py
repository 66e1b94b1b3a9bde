"""The report: one HTML file that needs no network, with every figure, every failure and every command line of a study.

The table of trials is plain HTML, written here, so that it reads without scripts; plotly draws the charts from the JSON
beside it. What trials say (names, messages, command lines) is data: it is escaped wherever it lands, and a content
security policy lets nothing run but this file's own scripts, by their hashes, and nothing load from anywhere.
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

from winnow.core.files import whole
from winnow.core.formats import Axis, axes_of, directions, plain, plain_lines
from winnow.core.types import Summary
from winnow.report import html_rows
from winnow.report.facts import WITHIN_POINTS, base_of, best_kept, counts, headline, payback, points, quality_of, ratio

SCRIPTS = ("charts.js", "table.js")


def write_report(path: Path, summary: Summary) -> None:
    """Writes the report to `path`, all of it or nothing: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as scratch:
        scratch.write_text(render(summary), encoding="utf-8", errors="replace")


def render(summary: Summary) -> str:
    """The whole page as text."""
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
            "policy": _policy(scripts),
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
            "data": embed(chart_data(summary, axes)),
            "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        },
    )


def chart_data(summary: Summary, axes: Sequence[Axis]) -> dict[str, Any]:
    """What the charts draw. Values are in each axis' own unit; `text` has them as they are printed."""
    on_front = set(summary.front)
    base = base_of(summary)
    trials = []
    for trial in summary.trials:
        known = {a.name: trial.figures[a.name] for a in axes if math.isfinite(trial.figures.get(a.name, math.nan))}
        trials.append(
            {
                "number": trial.number,
                "strategy": plain(str(trial.strategy)),
                "complete": trial.complete,
                "stopped": trial.stopped,
                "reason": str(trial.reason or ""),
                "front": trial.number in on_front,
                "base": base is not None and trial.number == base.number,
                "values": {a.name: known[a.name] / a.factor for a in axes if a.name in known},
                "text": {a.name: a.show(known[a.name]) for a in axes if a.name in known},
            }
        )
    shown = [
        {"name": a.name, "label": a.label, "title": a.title, "better": a.better, "maximize": a.maximize} for a in axes
    ]
    volumes = [v if math.isfinite(v) else None for v in summary.hypervolume]
    return {"study": plain(summary.name), "axes": shown, "trials": trials, "hypervolume": volumes}


def tiles(summary: Summary, axes: Sequence[Axis]) -> list[str]:
    """The headline figures: the front's size and, for each objective to minimise, the best that keeps the score."""
    tally = counts(summary)
    reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in tally["failed_by_reason"].items())
    found = [
        _tile(
            "On the front",
            str(tally["front"]),
            f"of {tally['complete']} complete trials",
            escape(f"{tally['failed']} failed: {reasons}" if reasons else "none failed"),
        )
    ]
    base, quality = base_of(summary), quality_of(summary)
    if base is None or quality is None:
        return found
    for axis in axes[: len(summary.objectives)]:
        best = best_kept(summary, axis.name) if axis.maximize is False else None
        if best is None:
            continue
        value = best.figures[axis.name]
        share = ratio(value, base.figures.get(axis.name))
        change = points(quality, best.figures.get(quality.name), base.figures.get(quality.name))
        note = f'<a href="#trial-{best.number}">trial {best.number}</a>, {escape(plain(str(best.strategy)))}'
        if change is not None:
            note += f", {escape(quality.name)} " + f"{change:+.1f}&nbsp;points".replace("-", "&minus;")
        times = f"{share:.2f}× the base model’s" if share is not None else ""
        found.append(_tile(f"lowest {axis.label} within {WITHIN_POINTS:g} points", axis.show(value), times, note))
    return found


def _tile(label: str, value: str, share: str, note_html: str) -> str:
    return (
        f'<li class="tile"><p class="tile-label">{escape(label)}</p><p class="tile-value">{escape(value)}</p>'
        f'<p class="tile-share">{escape(share)}</p><p class="tile-note">{note_html}</p></li>'
    )


def fingerprint_rows(fingerprint: Any, prefix: str = "") -> list[str]:
    """The fingerprint as rows of a description list; nested mappings get dotted names."""
    found = []
    for key, value in fingerprint.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found += fingerprint_rows(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            found.append(f"<div><dt>{escape(plain(name))}</dt><dd>{escape(plain_lines(text))}</dd></div>")
    return found


def embed(data: Any) -> str:
    """JSON for a script element: no character of it can end the element or start another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy: these scripts and no others, no request to anywhere.

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
    """Puts `values` where the template says `{{name}}`, in one pass: what is put in is never looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], template)
