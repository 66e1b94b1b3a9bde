"""The nouns of winnow: texts, figures, objectives, strategies and trials.

Imports neither torch nor transformers, so that `--help`, `--cfg job` and the search's own process stay quick.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from winnow.core.errors import STOPPED, Reason
from winnow.core.grammar import short

if TYPE_CHECKING:
    pass


class Slot(enum.IntEnum):
    """The places of a pipeline, in the order in which stages must come."""

    PRUNE = 0
    RECOVER = 1
    QUANTIZE = 2
    ADAPT = 3
    CACHE = 4
    PROMPT = 5


@dataclass(frozen=True)
class Document:
    """A text to train on: the loss is on the completion, and on all of a document without a prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation to train on: the loss is on what the assistant says."""

    messages: tuple[Mapping[str, str], ...]  # role and content of each


@dataclass(frozen=True)
class Calibration:
    """Text that methods calibrate on and recover with: a training split, never a benchmark's test items.

    `winnow.data.corpus` says which sources there are.
    """

    source: str = "nano"
    samples: int = 128
    max_length: int = 512
    split: str = "train"  # of a data set of the hub
    subset: str | None = None  # of a data set of the hub: its configuration
    data_dir: str | None = None  # where the files of a benchmark lie
    streaming: bool = False  # a data set of the hub: only what is read, every time; else all of it, once


DISTURBED = "disturbed"  # ends the source of a figure that was measured beside other work: `measured, disturbed`


class Figures(dict[str, float]):
    """What a probe found, by name; `sources` says of each where it came from, `measured` unless named otherwise."""

    def __init__(self, values: Mapping[str, float] | None = None, sources: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.sources: dict[str, str] = dict.fromkeys(self, "measured") | dict(sources or {})

    def disturbed(self) -> Figures:
        """The same figures, with sources that say that something disturbed their measurement."""
        return Figures(self, {name: f"{source}, {DISTURBED}" for name, source in self.sources.items()})

    def merge(self, other: Mapping[str, float]) -> None:
        self.update(other)
        self.sources |= getattr(other, "sources", dict.fromkeys(other, "measured"))


@dataclass(frozen=True)
class Objective:
    """A figure to optimise; the study keeps them as a vector, never as a weighted sum."""

    name: str
    maximize: bool
    unit: str = ""
    resolution: float = 0.0  # relative difference below which two values count as equal on the front

    @property
    def direction(self) -> str:
        return "maximize" if self.maximize else "minimize"


@dataclass(frozen=True)
class Strategy:
    """Methods in order, and their knobs as `method.<name>.<knob>: value`: nothing but a list of Hydra overrides."""

    methods: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def overrides(self) -> tuple[str, ...]:
        knobs = (f"{key}={short(value)}" for key, value in sorted(self.knobs.items()))
        return (f"method=[{','.join(self.methods)}]", *knobs)

    def __str__(self) -> str:
        """Short, for tables: `wanda(sparsity=0.5) + rtn(bits=4, group_size=64)`; `base` without methods."""
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
    """A finished trial. One that is not complete has a reason; a stopped one keeps the figures found until then.

    Attributes:
        estimates: of a stopped trial: its scores so far, each with `<name>_low` and `<name>_high`, and `share_scored`.
        seconds: compress, evaluate and their parts, overhead, total.
        energy: `wh` and `co2_g` of the whole trial.
        stages: of each, `method`, `seconds`, and whether an earlier trial had made it (`reused`).
        commands: the compress.py and evaluate.py lines that make it again.
        decision: why it was proposed, and what retraces that.
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
        """Whether something disturbed the measurement of this figure: no decision may rest on it."""
        return self.sources.get(name, "").endswith(DISTURBED)

    @property
    def stopped(self) -> bool:
        """Ended early because it could not reach the front: neither complete nor failed."""
        return self.reason in STOPPED

    @property
    def failed(self) -> bool:
        return not (self.complete or self.stopped)


@dataclass(frozen=True)
class Summary:
    """A study as its views see it (`front.json`, `report.html`, W&B): rebuilt from the study at any time."""

    name: str
    fingerprint: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]  # finished ones, by number; trial 0 is the base model
    front: tuple[int, ...]  # numbers of the non-dominated complete trials
    hypervolume: tuple[float, ...]  # after each of `trials`, relative to the reference point
    confirmed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # scores on items the search did not use
    unconfirmed: Mapping[int, str] = field(default_factory=dict)  # why some of the front have none
    energy: Mapping[str, float] = field(
        default_factory=dict
    )  # `wh` and `co2_g` of all that was done; else that of the trials
