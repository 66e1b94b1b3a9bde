"""What a probe is, and what more a benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from winnow.core.types import Figures
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served


@runtime_checkable
class Probe(Protocol):
    """A benchmark or a meter: what it finds, as figures by name."""

    def __call__(self, lm: LM, run: Run, *, served: Served | None = None) -> dict[str, float]:
        """`served`: the model, where a runtime has it open; else it is opened and closed again."""


class Benchmark(Probe, Protocol):
    """A probe whose figures are scores of items."""

    def scores(self) -> tuple[str, ...]:
        """The names of those in which more is better."""

    def __call__(
        self,
        lm: LM,
        run: Run,
        watch: Callable[[Sequence[Any], int], None] | None = None,
        served: Served | None = None,
    ) -> Figures:
        """`watch` is shown all outcomes so far and how many are to come, from time to time; what it raises ends the scoring."""
