"""Logs the curves of a training to Weights & Biases: loss, held-out loss and tokens/s over optimizer steps.

Nothing is imported or written before the first point, so a pipeline without training pays nothing. A failure of W&B is reported
once and does not end the training. As with studies (`winnow.report.tracking`), arguments, environment and host name of the process
are not recorded.

    python train.py method=[lora] wandb.mode=offline        then: wandb sync outputs/wandb/wandb/offline-run-*
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from winnow.core.files import write_first
from winnow.core.formats import plain
from winnow.report.runs import NAME_LENGTH
from winnow.report.tracking import check_mode, session, settings

logger = logging.getLogger(__name__)


class Curves:
    """Context manager around a training; `log` is what `Run.curve` calls.

    Args:
        mode: `offline`, `online` or `disabled`.
        folder: folder of the offline runs.
        name: name of the run.
        config: plain values shown beside the curves.
        memory: file for the id of an online run, which lasts as long as the training's checkpoints: a training that resumes
            continues the same run. Offline, a training that resumes starts a new run of the same group.

    Raises:
        UserError: an unknown mode.
        MissingExtra: wandb is not installed, unless `disabled`.
    """

    def __init__(
        self,
        mode: str,
        project: str,
        entity: str | None,
        folder: str | Path,
        name: str,
        config: Mapping[str, Any],
        memory: Path | None = None,
    ) -> None:
        check_mode(mode)
        self.mode, self.project, self.entity = mode, project, entity
        self.folder, self.memory = Path(folder).absolute(), memory
        self.name, self.config = plain(name)[:NAME_LENGTH], dict(config)
        self._opened = contextlib.ExitStack()
        self._run: Any = None
        self._broken = mode == "disabled"

    def __enter__(self) -> Curves:
        return self

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs a point of each figure at an optimizer step."""
        if self._broken:
            return
        try:
            if self._run is None:
                self._run = self._open()
            self._run.log({"step": step, **figures})
        except (Exception, SystemExit) as error:
            self._fail(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._run is not None:
                self._run.finish(exit_code=0 if error is None else 1)
        except (Exception, SystemExit) as failure:
            self._fail(failure)
        finally:
            self._close()

    def _open(self) -> Any:
        wandb = self._opened.enter_context(session(self.mode, self.folder))
        run = wandb.init(
            id=self._id(),
            name=self.name,
            group=self.name,
            job_type="training",
            project=self.project,
            entity=self.entity,
            config=self.config,
            dir=str(self.folder),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",
            settings=settings(wandb, self.mode, self.folder),
        )
        # W&B's own counter only increases, but a training that resumes from a checkpoint repeats some steps
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        if self.mode == "online" and self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            write_first(self.memory, secrets.token_hex(6))
            return self.memory.read_text(encoding="utf-8").strip()
        return secrets.token_hex(6)

    def _fail(self, error: BaseException) -> None:
        if not self._broken:
            self._broken = True
            logger.info(f"W&B: {type(error).__name__}: {plain(str(error))}; the training goes on without its curves")
            self._run = None
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self._opened.close()
