"""The curves of a training in Weights & Biases: loss, held-out loss, tokens/s over optimizer steps.

Nothing is imported or written before the first point, so that a pipeline without a training pays nothing. A failure of W&B is said
once and ends no training. As with studies (`winnow.report.tracking`), the process' arguments, environment and host name are not
recorded.

    python train.py method=[lora] wandb.mode=offline        then: wandb sync outputs/wandb/wandb/offline-run-*
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from winnow.core.formats import plain
from winnow.report.runs import NAME_LENGTH
from winnow.report.tracking import check_mode, session, settings


class Curves:
    """Context manager around a training; `log` is what `Run.curve` calls.

    Args:
        mode: `offline`, `online` or `disabled`.
        folder: offline runs are written below it.
        name: of the run.
        config: shown beside the curves: plain values.
        memory: a file that lasts as long as the training's checkpoints. The id of an online run is kept there, so that a training
            that goes on after it was stopped goes on in the same run; offline it makes a new one of the same group.
        say: is told what went wrong.

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
        say: Callable[[str], None] = print,
    ) -> None:
        check_mode(mode)
        self.mode, self.project, self.entity = mode, project, entity
        self.folder, self.memory = Path(folder).absolute(), memory
        self.name, self.config, self.say = plain(name)[:NAME_LENGTH], dict(config), say
        self._opened = contextlib.ExitStack()
        self._run: Any = None
        self._broken = mode == "disabled"

    def __enter__(self) -> Curves:
        return self

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A point of each figure at an optimizer step."""
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
        # W&B's own counter only goes up; a training that goes on from its checkpoint repeats some steps
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        if self.mode == "online" and self.memory is not None:
            if self.memory.exists():
                return self.memory.read_text().strip()
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            self.memory.write_text(found := secrets.token_hex(6))
            return found
        return secrets.token_hex(6)

    def _fail(self, error: BaseException) -> None:
        if not self._broken:
            self._broken = True
            self.say(f"W&B: {type(error).__name__}: {plain(str(error))}; the training goes on without its curves")
            self._run = None
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self._opened.close()
