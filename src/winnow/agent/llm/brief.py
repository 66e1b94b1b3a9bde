"""Writes the brief, which describes a search to a language model; it is deterministic and bounded in size.

Numbers are rounded, lists are cut to their most informative entries, and each text of another program is one clean short line
under `untrusted`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.agent.llm.critic import clean
from winnow.agent.llm.schema import as_proposal
from winnow.core.types import Strategy, Trial
from winnow.study.dimension import Dimension
from winnow.study.history import History
from winnow.study.policy import Suggestion
from winnow.study.space import Space

MOST = {"front": 16, "gaps": 2, "knobs": 30, "failures": 8, "running": 8, "rejected": 8}  # most entries of each list
STRATEGY_CHARACTERS, ERROR_CHARACTERS = 240, 160
COMPARED = 1000  # effects are computed from this many of the newest complete trials

Steps = dict[tuple[str, Any, Any], list[tuple[Any, Any, Trial, Trial]]]


def brief(
    history: History,
    space: Space,
    suggestion: Suggestion,
    budget_left: Mapping[str, float],
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the brief as JSON.

    Args:
        suggestion: the optimizer's suggestion.
        budget_left: what is left of each limit.
        about: names of the model, the benchmark and the hardware.
    """
    base = history.base
    complete = [t for t in history.trials if t.complete][-COMPARED:]
    methods = [m.name for m in space.methods]
    return {
        "objectives": [
            {"name": o.name, "better": "higher" if o.maximize else "lower", "unit": o.unit}
            | ({"of_the_base_model": rounded(base.figures[o.name])} if base else {})
            for o in history.objectives
        ],
        "constraints": dict(history.limits),
        "space": [
            _method(m.name, m.slot.name.lower(), m.dimensions) for m in sorted(space.methods, key=lambda m: m.slot)
        ],
        "trials": {
            "complete": sum(t.complete for t in history.trials),
            "stopped_early": sum(t.stopped for t in history.trials),
            "failed": sum(t.failed for t in history.trials),
            "since_the_front_was_last_improved": history.since_gain,
        },
        "front": _front(history),
        "gaps": gaps(history),
        "methods": _methods(history, methods),
        "adding": adding(history, complete, methods),
        "knobs": knobs(history, complete, space),
        "running": [_text(s) for s in history.running.values()][: MOST["running"]],
        "rejected_by_the_user": [_text(s) for s in history.rejected[-MOST["rejected"] :]],
        "suggestion": {
            **as_proposal(suggestion.strategy),
            "by": suggestion.by,
            "expected_gain": None if suggestion.expected_gain is None else rounded(suggestion.expected_gain),
        },
        "budget_left": {name: rounded(value) for name, value in budget_left.items()},
        "untrusted": {
            "names": {str(k): clean(str(v), 80) for k, v in (about or {}).items()},
            "failures": _failures(history),
        },
    }


def as_text(contents: Mapping[str, Any]) -> str:
    """Returns the brief as the model reads it, without the angle brackets that could end the fence around it."""
    return json.dumps(contents, indent=1, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")


def gaps(history: History) -> list[dict[str, Any]]:
    """Returns the widest gaps between neighbours on the front for each objective, as shares of the front's range."""
    widest = []
    for objective in history.objectives:
        ranked = sorted(history.on_front, key=lambda t: (t.figures[objective.name], t.number))
        values = [t.figures[objective.name] for t in ranked]
        if len(values) < 2 or values[-1] == values[0]:
            continue
        steps = [(high - low, place) for place, (low, high) in enumerate(itertools.pairwise(values))]
        for step, place in sorted(steps, key=lambda s: (-s[0], s[1]))[: MOST["gaps"]]:
            if step > 0:
                widest.append(
                    {
                        "objective": objective.name,
                        "from": rounded(values[place]),
                        "to": rounded(values[place + 1]),
                        "share_of_range": rounded(step / (values[-1] - values[0])),
                        "between_trials": [ranked[place].number, ranked[place + 1].number],
                    }
                )
    return widest


def knobs(history: History, complete: Sequence[Trial], space: Space) -> list[dict[str, Any]]:
    """Returns the mean change by a step of a knob to the next value, over pairs of trials that differ in this knob only.

    All steps of a range count as one, upwards, with the means of their start and end values.
    """
    dimensions = {d.key: d for m in space.methods for d in m.dimensions}
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Any, Trial]]] = defaultdict(list)
    for trial in complete:
        items = sorted(trial.strategy.knobs.items())
        for place, (key, value) in enumerate(items):
            if key in dimensions:
                rest = Strategy(trial.strategy.methods, dict(items[:place] + items[place + 1 :])).overrides
                groups[key, rest].append((value, trial))
    steps: Steps = defaultdict(list)
    for (key, _), members in groups.items():
        choices = dimensions[key].choices
        keyed = [(choices.index(v) if choices else v, v, t) for v, t in members if not choices or v in choices]
        ranked = sorted(keyed, key=lambda m: (m[0], m[2].number))
        for (_, low, first), (_, high, second) in itertools.pairwise(ranked):
            if low != high:
                steps[(key, low, high) if choices else (key, None, None)].append((low, high, first, second))
    rows: list[tuple[tuple[str, Any, Any], dict[str, Any]]] = []
    for (key, low, high), pairs in steps.items():
        ends = (low, high) if dimensions[key].choices else (_mean(p[0] for p in pairs), _mean(p[1] for p in pairs))
        change = _change(history, [(p[2], p[3]) for p in pairs])
        row = {"knob": key, "from": ends[0], "to": ends[1], "pairs": len(pairs), "mean_change": change}
        rows.append(((key, low, high), row))
    rows.sort(key=lambda item: (-len(steps[item[0]]), item[0][0], str(item[0][1])))
    return [row for _, row in rows][: MOST["knobs"]]


def adding(history: History, complete: Sequence[Trial], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the mean change by adding a method, over pairs of trials that differ in this method only."""
    by_strategy = {t.strategy.overrides: t for t in complete}
    if history.base is not None:
        by_strategy[()] = by_strategy[history.base.strategy.overrides] = history.base
    changes = []
    for name in methods:
        pairs = []
        for trial in complete:
            if name in trial.strategy.methods:
                own = f"method.{name}."
                other_knobs = {k: v for k, v in trial.strategy.knobs.items() if not k.startswith(own)}
                rest = Strategy(tuple(m for m in trial.strategy.methods if m != name), other_knobs)
                if rest.overrides in by_strategy:
                    pairs.append((by_strategy[rest.overrides], trial))
        if pairs:
            changes.append({"method": name, "pairs": len(pairs), "mean_change": _change(history, pairs)})
    return changes


def rounded(value: float) -> float:
    """Returns the value with 4 significant digits."""
    return float(f"{value:.4g}")


def _front(history: History) -> list[dict[str, Any]]:
    """Returns points of the front, evenly spaced by rank in the first objective, its extremes included."""
    first = history.objectives[0].name
    ranked = sorted(history.on_front, key=lambda t: (t.figures[first], t.number))
    if len(ranked) > MOST["front"]:
        last = len(ranked) - 1
        ranked = [ranked[round(i * last / (MOST["front"] - 1))] for i in range(MOST["front"])]
    return [
        {
            "trial": t.number,
            "strategy": _text(t.strategy),
            **{o.name: rounded(t.figures[o.name]) for o in history.objectives},
        }
        for t in ranked
    ]


def _methods(history: History, methods: Sequence[str]) -> dict[str, dict[str, int]]:
    """Returns how many trials of each method are complete, stopped, failed, and on the front."""
    counts = {name: dict.fromkeys(("complete", "stopped_early", "failed", "on_front"), 0) for name in methods}
    front = set(history.front)
    for trial in history.trials:
        state = "complete" if trial.complete else "stopped_early" if trial.stopped else "failed"
        for name in trial.strategy.methods:
            if name in counts:
                counts[name][state] += 1
                counts[name]["on_front"] += trial.number in front
    return counts


def _failures(history: History) -> list[dict[str, Any]]:
    """Returns the most frequent kinds of failure, each with its last message."""
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    last: dict[tuple[str, tuple[str, ...]], Trial] = {}
    for trial in history.trials:
        if trial.failed:
            kind = (str(trial.reason), trial.strategy.methods)
            counts[kind] += 1
            last[kind] = trial
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        {
            "reason": kind[0],
            "times": times,
            "last_strategy": _text(last[kind].strategy),
            "last_message": clean(last[kind].message, ERROR_CHARACTERS),
        }
        for kind, times in ranked[: MOST["failures"]]
    ]


def _method(name: str, slot: str, dimensions: Sequence[Dimension]) -> str:
    """Returns one line that lists a method's slot, knobs and their values."""
    texts = []
    for d in dimensions:
        values = "|".join(map(str, d.choices)) if d.choices else f"{d.low:g} to {d.high:g}"
        when = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in d.when.items())
        texts.append(f"{d.key.rpartition('.')[2]}={values}" + (f" with {when} only" if when else ""))
    return f"{slot}: {name}({', '.join(texts)})"


def _change(history: History, pairs: Sequence[tuple[Trial, Trial]]) -> dict[str, float]:
    """Returns the mean difference of each objective over pairs of trials."""
    names = [o.name for o in history.objectives]
    return {name: rounded(_mean(b.figures[name] - a.figures[name] for a, b in pairs)) for name in names}


def _mean(values: Any) -> float:
    listed = list(values)
    return rounded(sum(listed) / len(listed))


def _text(strategy: Strategy) -> str:
    """Returns a strategy as one short line."""
    return clean(str(strategy), STRATEGY_CHARACTERS)
