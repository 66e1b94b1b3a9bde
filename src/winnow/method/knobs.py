"""Knobs: what the fields of a stage may be. The search space is read from them, and settings out of range are refused by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.model.holders import ANY

if TYPE_CHECKING:
    from winnow.core.types import Calibration, Slot
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout
    from winnow.hardware.run import Run
    from winnow.model.lm import LM


@dataclass(frozen=True)
class Knob:
    """What a stage's field may be: one of `choices`, or a number from `low` to `high`."""

    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    search: bool = True  # False: checked, but not searched over
    when: Mapping[str, Any] = field(default_factory=dict)  # searched over only if these other knobs have these values
    search_range: tuple[float, float] | None = None  # narrower than what is allowed
    searched: tuple[Any, ...] = ()  # of the choices, those to search over; all if none are named
    integer: bool = False  # `knobs_of` reads it from the field's annotation

    def allows(self, value: Any) -> bool:
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        if not is_number(value) or (self.integer and not float(value).is_integer()):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def described(self) -> str:
        """What it takes, for messages."""
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
    """A dataclass field that says which values it takes; the search space is read from these."""
    made = Knob(tuple(choices), low, high, log, search, dict(when or {}), search_range, tuple(searched))
    return field(default=default, metadata={"knob": made})


def knobs_of(stage: type | Stage) -> dict[str, Knob]:
    """The knobs of a stage's class, by field name, in the order of definition."""
    if not dataclasses.is_dataclass(stage):
        raise TypeError(f"{stage} is not a dataclass")
    return {
        f.name: dataclasses.replace(f.metadata["knob"], integer=f.type in ("int", int))
        for f in dataclasses.fields(stage)
        if "knob" in f.metadata
    }


def is_number(value: Any) -> bool:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of one kind: 3.0 is 3, but true is not 1."""
    return (type(value) is type(other) or (is_number(value) and is_number(other))) and bool(value == other)


@runtime_checkable
class Stage(Protocol):
    """A compression method: a frozen dataclass of knobs."""

    slot: ClassVar[Slot]

    def __call__(self, lm: LM, run: Run) -> LM: ...

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None: ...

    def predict(self, plan: ModelLayout) -> ModelLayout: ...

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost: ...


class Checked:
    """Base of stages: a knob out of its range is an error at construction, before anything heavy happens."""

    known_as: ClassVar[str] = ""  # in conf/method, where that is not the name of the class in small letters
    preload: ClassVar[tuple[str, ...]] = ()  # slow imports, which a search's fork server makes once for all trials
    perplexity_bound: ClassVar[float] = 1.1  # at its defaults it keeps the embedded model within this ratio of its own
    aggressive: ClassVar[Mapping[str, Any]] = {}  # the knobs that compress most, for docs/methods.md
    eager_because: ClassVar[str | None] = None  # why what it makes cannot be decoded from CUDA graphs, after its name
    ends_pipeline: ClassVar[bool] = False  # what it makes is a file that no further stage works on
    matrices: ClassVar[tuple[str, ...] | None] = ANY  # held in which ways it works on them; None: on none by itself
    shown_after: ClassVar[tuple[str, ...]] = ()  # the methods without which there is nothing to show of it there
    shown_with: ClassVar[
        Mapping[str, Any]
    ] = {}  # and knobs that suit the embedded model, where the defaults are for others

    @property
    def libraries(self) -> tuple[str, ...]:
        """The modules of optional libraries that the stage cannot do without."""
        return ()

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        """Refuses what `predict` cannot know; called before any stage of a pipeline begins.

        Args:
            plan: of the model that the stages before this one will make of `base`.

        Raises:
            MissingExtra: a library is not installed.
        """
        require(*self.libraries)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        """What the stage makes of a model, from shapes alone; here: nothing that bytes would show."""
        return plan

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        """What applying it to a model of this plan costs; here: every weight is read and written once."""
        from winnow.estimate.cost import StageCost

        return StageCost.streamed(plan)

    def __post_init__(self) -> None:
        for field_name, knob_ in knobs_of(type(self)).items():
            value = getattr(self, field_name)
            if not knob_.allows(value):
                raise UserError(f"{self.option}.{field_name}={value} is out of range: it takes {knob_.described}")

    @property
    def option(self) -> str:
        """The key of its settings, for messages."""
        return f"method.{self.known_as or type(self).__name__.lower()}"
