"""Writes the views of a study (`front.json`, `final_results.json`, report, W&B), rebuilt from the study each time."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.files import write_json
from winnow.core.types import Summary, Trial

if TYPE_CHECKING:
    from winnow.study.study import Study

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0


@dataclass
class Views:
    """Writes `front.json`, `final_results.json` and `report.html` into the study's folder, and mirrors to W&B.

    Attributes:
        tracker: mirrors a summary to W&B; None if W&B is disabled.
    """

    folder: Path
    tracker: Any = None
    _reported_at: float = field(default_factory=time.monotonic)
    _front: tuple[int, ...] = ()

    def trial(self, trial: Trial, study: Study) -> None:
        """Logs a finished trial; writes the views if the front has changed or the report is old."""
        from winnow.report.table import trial_line

        logger.info(trial_line(trial, study.objectives, study.front))
        if study.front != self._front or time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self.write(study.summary(), final=False)

    def write(self, summary: Summary, final: bool, mirror: bool = True) -> None:
        """Writes `front.json`, and the other views if this is the final state or the report is old."""
        from winnow.report.html import write_report
        from winnow.report.table import front_json, results_json

        self._front = summary.front
        write_json(self.folder / "front.json", front_json(summary))
        if final or time.monotonic() - self._reported_at > REPORT_EVERY_S:
            write_json(self.folder / "final_results.json", results_json(summary))
            write_report(self.folder / "report.html", summary)
            self._reported_at = time.monotonic()
        if final and mirror and self.tracker is not None:
            self.tracker.mirror(summary)
