"""What a trial meets on its way through an evaluation, from cheap to dear; it is stopped where it cannot reach the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from winnow import build
from winnow.benchmark import divergence
from winnow.types import LM, Figures, Run

if TYPE_CHECKING:
    from winnow.benchmark.samples import Sample
    from winnow.hardware.runtime import Served


class Gates:
    """The gates of one trial.

    Args:
        config: of the trial; `model` is the base model.
        folder: of the trial.
    """

    scores_first = False

    def __init__(self, config: DictConfig, folder: Path, log: Callable[[str], None]) -> None:
        self._config, self._log = config, log

    def served(self, lm: LM, served: Served, run: Run) -> Figures:
        base = build.model(self._config)
        base.manifest = {"sha256": lm.manifest["base"]["sha256"]}  # known: its weights need not be read for it
        is_base = not lm.manifest.get("stages")
        try:
            wanted = divergence.reference(base, served if is_base else None, run, run.device)
            return divergence.divergence(served, wanted)
        except NotImplementedError as error:
            self._log(f"no divergence from the base model: {error}")
            return Figures()

    def measured(self, figures: Figures) -> None: ...

    def scored(self, samples: Sequence[Sample], left: int) -> None: ...
