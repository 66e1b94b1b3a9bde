"""Defines the core data types: texts, figures, objectives, strategies and trials.

The module imports neither torch nor transformers, so that `--help`, `--cfg job` and the search process start quickly.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from winnow.core.errors import STOPPED, Reason
from winnow.core.grammar import quoted_if_needed


class Slot(enum.IntEnum):
    """The slots of a pipeline, in the order in which its stages must run."""

    PRUNE = 0
    RECOVER = 1
    QUANTIZE = 2
    ADAPT = 3
    CACHE = 4
    PROMPT = 5


@dataclass(frozen=True)
class Document:
    """A training text: the loss covers the completion, or the whole document if it has no prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A training conversation: the loss covers the assistant's messages."""

    messages: tuple[Mapping[str, str], ...]  # role and content of each


@dataclass(frozen=True)
class Calibration:
    """Settings of the calibration and recovery text: it comes from a training split, never from a benchmark's test items.

    `winnow.data.corpus` lists the sources.
    """

    source: str = "nano"
    samples: int = 128
    max_length: int = 512
    split: str = "train"  # of a data set on the hub
    subset: str | None = None  # configuration of a data set on the hub
    data_dir: str | None = None  # folder of a benchmark's files
    streaming: bool = False  # True: a data set on the hub is streamed each time; False: it is downloaded once


DISTURBED = "disturbed"  # suffix of a figure's source if other work disturbed its measurement: `measured, disturbed`


class Figures(dict[str, float]):
    """Measurements of a probe by name; `sources` gives the origin of each, by default `measured`."""

    def __init__(self, values: Mapping[str, float] | None = None, sources: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.sources: dict[str, str] = dict.fromkeys(self, "measured") | dict(sources or {})

    def disturbed(self) -> Figures:
        """Returns the same figures with sources marked as disturbed."""
        return Figures(self, {name: f"{source}, {DISTURBED}" for name, source in self.sources.items()})

    def merge(self, other: Mapping[str, float]) -> None:
        self.update(other)
        self.sources |= getattr(other, "sources", dict.fromkeys(other, "measured"))


@dataclass(frozen=True)
class Objective:
    """A figure to optimise; the study keeps objectives as a vector, never as a weighted sum."""

    name: str
    maximize: bool
    unit: str = ""
    resolution: float = 0.0  # relative difference below which two values count as equal on the front

    @property
    def direction(self) -> str:
        return "maximize" if self.maximize else "minimize"


@dataclass(frozen=True)
class Strategy:
    """Methods in order and their knobs, as `method.<name>.<knob>: value`; equivalent to a list of Hydra overrides."""

    methods: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def overrides(self) -> tuple[str, ...]:
        knobs = (f"{key}={quoted_if_needed(value)}" for key, value in sorted(self.knobs.items()))
        return (f"method=[{','.join(self.methods)}]", *knobs)

    def __str__(self) -> str:
        """Returns a short form for tables: `wanda(sparsity=0.5) + rtn(bits=4, group_size=64)`; `base` without methods."""
        parts = []
        for method in self.methods:
            prefix = f"method.{method}."
            knobs = [f"{k.removeprefix(prefix)}={_short(v)}" for k, v in self.knobs.items() if k.startswith(prefix)]
            parts.append(f"{method}({', '.join(knobs)})" if knobs else method)
        return " + ".join(parts) or "base"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Trial:
    """A finished trial. An incomplete trial has a reason; a stopped trial keeps the figures measured so far.

    Attributes:
        estimates: scores of a stopped trial so far, each with `<name>_low` and `<name>_high`, and `share_scored`.
        seconds: durations of compress, evaluate and their parts, overhead, and the total.
        energy: `wh` and `co2_g` of the whole trial.
        stages: `method`, `seconds` and `reused` (the result of an earlier trial was used) of each stage.
        commands: the compress.py and evaluate.py command lines that reproduce the trial.
        decision: why the agent proposed the trial, with what is needed to retrace it.
    """

    number: int
    strategy: Strategy
    figures: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    reason: Reason | None = None
    message: str = ""
    estimates: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    commands: tuple[str, ...] = ()
    proposed_by: str = ""
    decision: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.reason is None

    def disturbed(self, name: str) -> bool:
        """Returns whether the measurement of a figure was disturbed: no decision may rest on it."""
        return self.sources.get(name, "").endswith(DISTURBED)

    @property
    def stopped(self) -> bool:
        """Whether the trial was ended early because it could not reach the front: it is neither complete nor failed."""
        return self.reason in STOPPED

    @property
    def failed(self) -> bool:
        return not (self.complete or self.stopped)


@dataclass(frozen=True)
class Summary:
    """A snapshot of a study for its views (`front.json`, `report.html`, W&B), which can be rebuilt at any time."""

    name: str
    fingerprint: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]  # finished trials by number; trial 0 is the base model
    front: tuple[int, ...]  # numbers of the non-dominated complete trials
    hypervolume: tuple[float, ...]  # after each trial, relative to the reference point
    # scores on items that the search did not use, by trial
    confirmed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    unconfirmed: Mapping[int, str] = field(default_factory=dict)  # why some trials of the front have no such scores
    # `wh` and `co2_g` of the whole study, or of the trials if the former is unknown
    energy: Mapping[str, float] = field(default_factory=dict)
