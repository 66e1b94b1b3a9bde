"""Renders the report's table of trials as HTML: one row for each trial and its details folded below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from winnow.core.formats import Axis, duration, plain, plain_lines, total_seconds
from winnow.core.types import DISTURBED, Summary, Trial
from winnow.report.facts import base_of
from winnow.report.table import holdout_failures, relative, state_of
from winnow.runtime import in_turn

SOURCES = {
    "measured": "measured here",
    "counter": "read from a hardware counter",
    "estimated": "estimated by a model, not metered",
    DISTURBED: "measured beside other work, although it was tried again: the front does not rest on it",
}
UNTAGGED = tuple(in_turn.SOURCE.split(", "))  # sources that need no tag
SHORT = {"estimated": "est."}


def head(axes: Sequence[Axis]) -> str:
    """Returns the header cells; every column is sortable."""
    objectives = [axis for axis in axes if axis.maximize is not None]
    cells = [_heading("trial", "Trial"), _heading("state", "State"), _heading("strategy", "Strategy")]
    cells += [_heading(axis.name, axis.label, axis.better, number=True) for axis in objectives]
    cells += [_heading("seconds", "Time", number=True), _heading("by", "Proposed by")]
    return "".join(cells) + '<th scope="col"><span class="sr">Details</span></th>'


def _heading(key: str, label: str, note: str = "", number: bool = False) -> str:
    arrow = {"higher is better": " ↑", "lower is better": " ↓"}.get(note, "")
    title = f' title="{escape(note)}"' if note else ""
    kind = ' class="num"' if number else ""
    return (
        f'<th scope="col"{kind}><button type="button" class="sort" data-key="{escape(key)}"{title}>'
        f'{escape(label)}<span class="better">{arrow}</span></button></th>'
    )


def body(summary: Summary, axes: Sequence[Axis]) -> list[str]:
    """Returns two rows for each trial: the figures and the details."""
    base, lucky = base_of(summary), holdout_failures(summary)
    return [
        _row(t, base, summary, axes, lucky) + _details(t, summary, axes, lucky.get(t.number, ""))
        for t in summary.trials
    ]


def _row(trial: Trial, base: Trial | None, summary: Summary, axes: Sequence[Axis], lucky: Mapping[int, str]) -> str:
    objectives = axes[: len(summary.objectives)]
    is_base = base is not None and trial.number == base.number
    front = trial.number in summary.front
    name = plain(str(trial.strategy))
    classes = [word for word, true in (("front", front), ("base", is_base), ("failed", trial.failed)) if true]
    cells = [
        _cell(f'<a href="#trial-{trial.number}">{trial.number}</a>', trial.number),
        _cell(_badges(trial, front, is_base, trial.number in lucky), "front" if front else state_of(trial)),
    ]
    message = plain(trial.message.strip().rpartition("\n")[2])
    message_html = f'<span class="message">{escape(message)}</span>' if not trial.complete and message else ""
    cells.append(
        f'<th scope="row" class="strategy" data-sort="{escape(name)}"><code>{_wrapped(name)}</code>{message_html}</th>'
    )
    for axis in objectives:
        value = trial.figures.get(axis.name)
        relative_text = "" if base is None or is_base else relative(axis, value, base.figures.get(axis.name))
        note = f'<span class="relative">{escape(relative_text.replace("x", "×"))}</span>' if relative_text else ""
        value_html = f"{escape(axis.show(value))}{_tag(trial, axis.name)}{note}"
        if value is None and axis.name in trial.estimates:
            value = trial.estimates[axis.name]
            value_html = (
                f'<abbr class="source" title="estimated from the items scored">≈</abbr> {escape(axis.show(value))}'
            )
        cells.append(_cell(value_html, value, number=True))
    seconds = total_seconds(trial)
    cells += [
        _cell(escape(duration(seconds)), seconds, number=True),
        _cell(escape(plain(trial.proposed_by) or "–"), plain(trial.proposed_by)),
        f"<td>{_details_button(trial)}</td>",
    ]
    return f'<tr id="trial-{trial.number}" class="trial {" ".join(classes)}">{"".join(cells)}</tr>'


def _details_button(trial: Trial) -> str:
    return (
        f'<button type="button" class="more" aria-expanded="true" aria-controls="more-{trial.number}">'
        f'<span class="sr">Details of trial {trial.number}</span></button>'
    )


def _badges(trial: Trial, front: bool, is_base: bool, is_luck: bool) -> str:
    badges = ['<span class="badge front">front</span>'] if front else []
    if is_luck:
        badges.append('<span class="badge stopped">luck</span>')
    if is_base:
        badges.append('<span class="badge base">base</span>')
    if trial.stopped:
        badges.append(f'<span class="badge stopped">{escape(str(trial.reason))}</span>')
    elif trial.failed:
        badges.append(f'<span class="badge failed">{escape(str(trial.reason).replace("_", " "))}</span>')
    return " ".join(badges) or '<span class="badge">complete</span>'


def _cell(html: str, sort: float | str | None, number: bool = False) -> str:
    """Returns a cell with its sort key; a cell without a figure sorts last in either direction."""
    missing = sort is None or (isinstance(sort, float) and not math.isfinite(sort))
    key = "" if missing else escape(str(sort))
    return f'<td{" class=num" if number else ""} data-sort="{key}">{html}</td>'


def _wrapped(name: str) -> str:
    """Returns a strategy's name that wraps between methods before it wraps within one."""
    return " + ".join(f"<span>{escape(part)}</span>" for part in name.split(" + "))


def _tag(trial: Trial, name: str) -> str:
    """Returns a tag for a figure that was not simply measured."""
    if name not in trial.figures:
        return ""
    tags = [word for word in trial.sources.get(name, "measured").split(", ") if word not in UNTAGGED]
    return "".join(
        f' <abbr class="source" title="{escape(SOURCES.get(word, word))}">{escape(SHORT.get(word, word))}</abbr>'
        for word in tags
    )


def _details(trial: Trial, summary: Summary, axes: Sequence[Axis], luck: str) -> str:
    parts = []
    if why := plain(str(trial.decision.get("why", ""))):
        parts.append(_block("Why", f"<p>{escape(why)}</p>"))
    if not trial.complete:
        message = trial.message.strip() or "no message"
        parts.append(
            _block(
                "Stopped early" if trial.stopped else "Failed",
                f'<p>{escape(str(trial.reason))}</p><pre class="said">{escape(plain_lines(message))}</pre>',
            )
        )
    if trial.commands:
        lines = "".join(_command(plain_lines(command)) for command in trial.commands)
        parts.append(_block("Make it again", lines, wide=True))
    figures = [
        f"<tr><th scope=row>{escape(axis.label)}</th><td>{escape(axis.show(trial.figures[axis.name]))}</td>"
        f"<td>{escape(trial.sources.get(axis.name, 'measured'))}</td></tr>"
        for axis in axes
        if axis.name in trial.figures
    ]
    if figures:
        header = "<tr><th scope=col>Figure</th><th scope=col>Value</th><th scope=col>Source</th></tr>"
        parts.append(_block("Figures", f'<table class="figures">{header}{"".join(figures)}</table>'))
    fresh = summary.confirmed.get(trial.number, {})
    rows = [
        f"<tr><th scope=row>{escape(axis.label)}</th><td>{escape(axis.show(fresh[axis.name]))}</td></tr>"
        for axis in axes
        if axis.name in fresh
    ]
    if rows:
        note = f"<p>Luck: {escape(luck)}.</p>" if luck else ""
        parts.append(_block("On fresh items", f'<table class="figures">{"".join(rows)}</table>{note}'))
    elif why := summary.unconfirmed.get(trial.number, ""):
        parts.append(_block("On fresh items", f"<p>Not confirmed: {escape(plain_lines(why))}</p>"))
    if trial.estimates:
        parts.append(_block("Estimates when it was stopped", _estimates(trial, axes)))
    if trial.seconds:
        parts.append(_block("Time", _time_split(trial)))
    columns = len(summary.objectives) + 6
    inner = "".join(parts) or "<p>Nothing more was recorded.</p>"
    return f'<tr id="more-{trial.number}" class="details"><td colspan="{columns}"><div>{inner}</div></td></tr>'


def _estimates(trial: Trial, axes: Sequence[Axis]) -> str:
    rows = [f"<tr><th scope=row>items scored</th><td>{trial.estimates.get('share_scored', 0.0):.0%}</td></tr>"]
    for axis in axes:
        if axis.name in trial.estimates:
            low, high = (trial.estimates.get(f"{axis.name}_{end}") for end in ("low", "high"))
            interval = f" ({axis.show(low)} to {axis.show(high)})" if low is not None and high is not None else ""
            value_html = escape(axis.show(trial.estimates[axis.name]) + interval)
            rows.append(f"<tr><th scope=row>{escape(axis.label)}</th><td>{value_html}</td></tr>")
    return f'<table class="figures">{"".join(rows)}</table>'


def _block(title: str, html: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h4>{title}</h4>{html}</section>"


def _command(line: str) -> str:
    return (
        f'<div class="command"><pre><code>{escape(line)}</code></pre>'
        '<button type="button" class="copy">Copy</button></div>'
    )


def _time_split(trial: Trial) -> str:
    """Returns the time of each part of a trial as bars relative to its total."""
    total = total_seconds(trial) or 0.0
    rows = []
    for name, seconds in trial.seconds.items():
        share = 100 * seconds / total if total > 0 and math.isfinite(seconds) else 0.0
        bar = (
            "" if name == "total" else f'<span class="bar"><i style="width:{min(max(share, 0), 100):.1f}%"></i></span>'
        )
        rows.append(f"<tr><th scope=row>{escape(name)}</th><td>{escape(duration(seconds))}</td><td>{bar}</td></tr>")
    return f'<table class="figures">{"".join(rows)}</table>'
