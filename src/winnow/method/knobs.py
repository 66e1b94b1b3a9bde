"""Defines stages and their knobs, the configurable fields: knobs define the search space and refuse values out of range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.model.matrix_kinds import ANY

if TYPE_CHECKING:
    from winnow.core.types import Calibration, Slot
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout
    from winnow.hardware.run import Run
    from winnow.model.lm import LM


@dataclass(frozen=True)
class Knob:
    """The allowed values of a stage's field: one of `choices`, or a number from `low` to `high`."""

    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    search: bool = True  # False: values are checked, but not searched over
    when: Mapping[str, Any] = field(default_factory=dict)  # searched over only if other knobs have these values
    search_range: tuple[float, float] | None = None  # narrower than the allowed range
    searched: tuple[Any, ...] = ()  # the choices to search over; all if empty
    integer: bool = False  # `knobs_of` reads it from the field's annotation

    def allows(self, value: Any) -> bool:
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        if not is_number(value) or (self.integer and not float(value).is_integer()):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def allowed_values(self) -> str:
        """A description of the allowed values, for messages."""
        return f"whole numbers {self}" if self.integer and not self.choices else str(self)

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}" if self.choices else f"from {self.low:g} to {self.high:g}"


def knob(
    default: Any,
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    search: bool = True,
    when: Mapping[str, Any] | None = None,
    search_range: tuple[float, float] | None = None,
    searched: Sequence[Any] = (),
) -> Any:
    """Returns a dataclass field with a `Knob`, from which the search space is read."""
    definition = Knob(tuple(choices), low, high, log, search, dict(when or {}), search_range, tuple(searched))
    return field(default=default, metadata={"knob": definition})


def knobs_of(stage: type | Stage) -> dict[str, Knob]:
    """Returns the knobs of a stage's class by field name, in the order of definition."""
    if not dataclasses.is_dataclass(stage):
        raise TypeError(f"{stage} is not a dataclass")
    return {
        f.name: dataclasses.replace(f.metadata["knob"], integer=f.type in ("int", int))
        for f in dataclasses.fields(stage)
        if "knob" in f.metadata
    }


def is_number(value: Any) -> bool:
    """Returns whether a value is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Returns whether two values are equal and of the same kind: 3.0 is 3, but true is not 1."""
    return (type(value) is type(other) or (is_number(value) and is_number(other))) and bool(value == other)


class StageResult(NamedTuple):
    """The model that a stage makes, and what the stage adds to its record in the artifact's manifest."""

    lm: LM
    notes: Mapping[str, Any] = {}


@runtime_checkable
class Stage(Protocol):
    """A compression method: a frozen dataclass of knobs."""

    slot: ClassVar[Slot]

    def __call__(self, lm: LM, run: Run) -> StageResult: ...

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None: ...

    def predict(self, plan: ModelLayout) -> ModelLayout: ...

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost: ...


class BaseStage:
    """Base of stages: construction raises an error for a knob out of its range, before any costly work."""

    option_name: ClassVar[str] = ""  # name in conf/method, if it is not the lower-case name of the class
    preload: ClassVar[tuple[str, ...]] = ()  # slow imports, which a search's fork server does once for all trials
    perplexity_bound: ClassVar[float] = 1.1  # largest perplexity at the defaults, relative to the embedded model's own
    aggressive: ClassVar[Mapping[str, Any]] = {}  # the knobs that compress most, for docs/methods.md
    # why its artifacts cannot be decoded from CUDA graphs; follows its name in messages
    eager_reason: ClassVar[str | None] = None
    ends_pipeline: ClassVar[bool] = False  # True: its result is a file that no further stage works on
    matrices: ClassVar[tuple[str, ...] | None] = ANY  # kinds of matrices that it works on; None: not on matrices
    measured_after: ClassVar[tuple[str, ...]] = ()  # methods before it when docs/methods.md measures it
    measured_with: ClassVar[Mapping[str, Any]] = {}  # knobs for the embedded model there, if its defaults do not suit

    @property
    def libraries(self) -> tuple[str, ...]:
        """The modules of optional libraries that the stage needs."""
        return ()

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        """Checks what `predict` cannot know, before any stage of a pipeline begins.

        Args:
            plan: layout of the model that the stages before this one will make from `base`.

        Raises:
            MissingExtra: a library is not installed.
        """
        require(*self.libraries)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        """Returns the layout after the stage, from shapes alone; by default it is unchanged."""
        return plan

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        """Returns the cost of the stage for a model of this layout; by default every weight is read and written once."""
        from winnow.estimate.cost import StageCost

        return StageCost.streamed(plan)

    def __post_init__(self) -> None:
        for field_name, knob_ in knobs_of(type(self)).items():
            value = getattr(self, field_name)
            if not knob_.allows(value):
                raise UserError(f"{self.option}.{field_name}={value} is out of range: it takes {knob_.allowed_values}")

    @property
    def option(self) -> str:
        """The config key of the stage, for messages."""
        return f"method.{self.option_name or type(self).__name__.lower()}"
