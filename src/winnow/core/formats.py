"""Formats figures for people, with a label, a unit, and three significant digits.

A figure's unit is that of its objective, or else the suffix of its name (`size_bytes`, `latency_ms`, `energy_wh`).
Every view prints through this module, so that the terminal and the report agree.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from winnow.core.types import Summary, Trial

# suffix of a figure's name -> unit; the longest match counts
SUFFIXES = {
    "_bytes": "B",
    "_ns": "ns",
    "_us": "µs",
    "_ms": "ms",
    "_s": "s",
    "_seconds": "s",
    "_wh": "Wh",
    "_kwh": "kWh",
    "_j": "J",
    "_w": "W",
    "_g": "g",
    "_kg": "kg",
    "_percent": "%",
}
# unit -> display units, smallest first, each with its size in the unit
SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "B": ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")),
    "ms": ((1e-3, "µs"), (1, "ms"), (1e3, "s")),
    "s": ((1e-6, "µs"), (1e-3, "ms"), (1, "s")),
    "Wh": ((1e-6, "µWh"), (1e-3, "mWh"), (1, "Wh"), (1e3, "kWh")),
    "J": ((1e-6, "µJ"), (1e-3, "mJ"), (1, "J"), (1e3, "kJ"), (1e6, "MJ")),
    "g": ((1e-6, "µg"), (1e-3, "mg"), (1, "g"), (1e3, "kg")),
}
ALIASES = {"bytes": "B", "byte": "B", "wh": "Wh", "sec": "s", "seconds": "s"}
ACRONYMS = {"co2": "CO2", "ram": "RAM", "vram": "VRAM", "gpu": "GPU", "cpu": "CPU", "kl": "KL", "ttft": "TTFT"}
MISSING = "–"
DISTURBED_MARK = " ~"
DISTURBED_LEGEND = "~ measured beside other work, although it was tried again: the front does not rest on it"


@dataclass(frozen=True)
class Axis:
    """A figure of a study and its display: `unit` is the display unit, `factor` its size in the figure's own unit."""

    name: str
    label: str
    unit: str = ""
    factor: float = 1.0
    maximize: bool | None = None  # None: a figure that is not an objective has no better direction

    @property
    def better(self) -> str:
        return "" if self.maximize is None else f"{'higher' if self.maximize else 'lower'} is better"

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def show(self, value: float | None) -> str:
        """Returns a value with the axis' unit, which is the same for every trial; a dash for a missing value."""
        if value is None or not math.isfinite(value):
            return MISSING
        text = digits(value / self.factor, unitless=not self.unit)
        return f"{text} {self.unit}" if self.unit else text


def unit_of(name: str, declared: str = "") -> str:
    """Returns the unit of a figure: the declared one, or the suffix of its name; empty for a plain number."""
    if declared:
        return ALIASES.get(declared.lower(), declared)
    suffix = _suffix(name)
    return SUFFIXES[suffix] if suffix else ""


def label_of(name: str) -> str:
    """Returns a figure's name without its unit: `size_bytes` -> `size`, `co2_g` -> `CO2`."""
    stem = name.removesuffix(_suffix(name))
    return " ".join(ACRONYMS.get(word.lower(), word) for word in stem.split("_") if word) or name


def _suffix(name: str) -> str:
    """Returns the suffix of `name` that gives its unit; empty for none and for rates: `tokens_per_s` is not in seconds."""
    if "_per_" in name:
        return ""
    return max((s for s in SUFFIXES if name.endswith(s) and name != s), key=len, default="")


def digits(value: float, unitless: bool = False) -> str:
    """Formats three significant digits, without exponent for common sizes: `2.88`, `0.936`, `12,400`, `8` for a count."""
    size = abs(value)
    if unitless and (value == 0 or (size > 1 and value == int(value) and size < 1e6)):
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    if unitless and 0.1 <= size <= 1:
        return f"{value:.3f}"
    if size < 1e-4 or size >= 1e7:
        return f"{value:.2e}"
    # rounded first: 9.999 has one digit before the point, 10.0 two
    decimals = max(0, 2 - math.floor(math.log10(float(f"{size:.2e}"))))
    return f"{value:,.{decimals}f}"


def scale(unit: str, values: Iterable[float]) -> tuple[float, str]:
    """Returns the multiple of `unit` that suits the median of `values`, as (size in `unit`, name)."""
    sizes = [abs(v) for v in values if math.isfinite(v) and v]
    if unit not in SCALES or not sizes:
        return 1.0, unit
    middle = statistics.median(sizes)
    return max((s for s in SCALES[unit] if s[0] <= middle), default=SCALES[unit][0])


def human(name: str, value: float, unit: str = "") -> str:
    """Formats a single figure in the unit that suits it: `2.88 MB`."""
    factor, display_unit = scale(unit_of(name, unit), [value])
    return Axis(name, "", display_unit, factor).show(value)


def mark(trial: Trial, name: str) -> str:
    """Returns the mark for a figure whose measurement was disturbed; empty for others."""
    return DISTURBED_MARK if name in trial.figures and trial.disturbed(name) else ""


def duration(seconds: float | None) -> str:
    """Formats a duration: `850 ms`, `12.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return human("", seconds, "s") if seconds else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def total_seconds(trial: Trial) -> float | None:
    """Returns the duration of a trial: its `total`, or else the sum of its parts; None if nothing was timed."""
    parts = [v for k, v in trial.seconds.items() if k != "total"]
    return trial.seconds.get("total", sum(parts) if parts else None)


def axes_of(summary: Summary) -> tuple[Axis, ...]:
    """Returns an axis for every figure of the study: the objectives in their order, then the others by name."""
    complete = [t for t in summary.trials if t.complete]
    objectives = {o.name: o for o in summary.objectives}
    excluded = ("_stderr", "_requests", "items")  # these are uncertainties and counts, not results
    other_names = sorted({n for t in complete for n in t.figures if not n.endswith(excluded)} - set(objectives))
    names = [*objectives, *other_names]
    label_counts = Counter(map(label_of, names))
    axes = []
    for name in names:
        objective = objectives.get(name)
        unit = unit_of(name, objective.unit if objective else "")
        factor, display_unit = scale(unit, [t.figures[name] for t in complete if name in t.figures])
        label = label_of(name) if label_counts[label_of(name)] == 1 else name
        axes.append(Axis(name, label, display_unit, factor, objective.maximize if objective else None))
    return tuple(axes)


def directions(axes: Sequence[Axis]) -> str:
    """Describes which direction is better: `accuracy: higher is better; size, latency: lower is better`."""
    parts = []
    for better in ("higher is better", "lower is better"):
        labels = [axis.label for axis in axes if axis.better == better]
        if labels:
            parts.append(f"{', '.join(labels)}: {better}")
    return "; ".join(parts)


def plain(text: str) -> str:
    """Returns a text as one line without control characters, which could move a terminal's cursor or colour it."""
    return " ".join(_printable(text).split())


def plain_lines(text: str) -> str:
    """Removes control characters from each line and keeps the spaces, for tracebacks and command lines."""
    return "\n".join(map(_printable, text.splitlines()))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
