"""Defines the protocols of probes and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from winnow.core.types import Figures
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime import Served


@runtime_checkable
class Probe(Protocol):
    """A benchmark or a meter, which returns figures by name."""

    def __call__(self, lm: LM, run: Run, *, served: Served | None = None) -> dict[str, float]:
        """Measures `lm`; `served` is the model as a runtime has it open, None opens and closes it."""


class Benchmark(Probe, Protocol):
    """A probe that scores a model on items."""

    def scores(self) -> tuple[str, ...]:
        """Returns the names of the figures in which more is better."""

    def __call__(
        self,
        lm: LM,
        run: Run,
        watch: Callable[[Sequence[Any], int], None] | None = None,
        served: Served | None = None,
    ) -> Figures:
        """Scores `lm`, and calls `watch` from time to time with all outcomes so far and the number of items to come.

        An exception from `watch` ends the scoring.
        """
