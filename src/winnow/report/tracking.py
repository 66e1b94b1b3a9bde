"""Mirrors a study to Weights & Biases: one run per trial, grouped by study, and a run `front` with a table of all trials.

W&B is a view, built from the study on request (`Tracker.mirror`) and never while a trial runs: importing wandb costs a few
seconds once, and a run costs 10 ms on an idle machine and 0.1 s on a busy one. The helper process and the threads of wandb have
ended when `mirror` returns, so they do not disturb the processes of the search.
Run ids follow from the study and the trial number, and digests of mirrored runs are stored, so mirroring again adds only what is
new. Arguments, environment, code, git state, packages and host name of the process are not recorded; the versions of Python and
wandb and the platform are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from winnow.core.errors import UserError
from winnow.core.files import write_json
from winnow.core.formats import plain
from winnow.core.libraries import require
from winnow.core.types import Summary
from winnow.report.runs import NAME_LENGTH, Entry, front_entry, trial_entry

logger = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
TIMEOUT_SECONDS = 30.0


def check_mode(mode: str) -> None:
    """Raises UserError for an unknown mode, and MissingExtra if the mode needs wandb and it is not installed."""
    if mode not in MODES:
        raise UserError(f"wandb mode {mode!r} is unknown; it is one of {', '.join(MODES)}")
    if mode != "disabled":
        require("wandb")


@contextlib.contextmanager
def session(mode: str, folder: Path) -> Iterator[Any]:
    """Context manager that gives wandb with its helper process, which is stopped at the end in any case."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    wandb.setup(settings(wandb, mode, folder))
    try:
        # never prompts at the terminal: a search may run unattended
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError("no API key; log in with `wandb login`, or use wandb.mode=offline")
        yield wandb
    finally:
        wandb.teardown()


def settings(wandb: Any, mode: str, folder: Path) -> Any:
    """Returns the settings of W&B runs."""
    return wandb.Settings(
        mode=mode,
        root_dir=str(folder),
        silent=True,
        quiet=True,
        console="off",
        symlink=False,
        init_timeout=TIMEOUT_SECONDS,
        finish_timeout=TIMEOUT_SECONDS if mode == "online" else 0.0,
        login_timeout=TIMEOUT_SECONDS,
        # records nothing that could hold a secret or that says more about the machine than the study does
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        host="winnow",
        program="winnow",
        # tables stay in the run's folder and do not go to the artifact cache in the home folder
        allow_offline_artifacts=False,
    )


class Tracker:
    """Mirrors studies to W&B. `offline` writes files under `folder` for `wandb sync`; it needs no account or network.

    A failure of W&B is logged once and ends nothing; the next `mirror` tries again.

    Raises:
        UserError: the mode is unknown.
        MissingExtra: wandb is not installed, unless `disabled`.
    """

    def __init__(
        self,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "winnow",
        entity: str | None = None,
        folder: str | Path = "outputs/wandb",
    ) -> None:
        check_mode(mode)
        self.mode = mode
        self.project = project
        self.entity = entity
        self.folder = Path(folder).absolute()
        self._warned = False

    def mirror(self, summary: Summary) -> int:
        """Brings W&B up to date with the study; returns the number of runs written."""
        if self.mode == "disabled" or not summary.trials:
            return 0
        written = 0
        try:
            digests = self._read_digests()
            entries = [trial_entry(summary, trial) for trial in summary.trials]
            new = [e for e in [*entries, front_entry(summary)] if digests.get(e.id) != e.digest]
            if not new:
                return 0
            with session(self.mode, self.folder) as wandb:
                for entry in new:
                    self._write(wandb, entry, summary.name)
                    digests[entry.id] = entry.digest
                    self._write_digests(digests)
                    written += 1
        except (Exception, SystemExit) as error:
            if not self._warned:
                self._warned = True
                logger.info(f"W&B: {type(error).__name__}: {plain(str(error))}; the study itself is complete")
        return written

    def _write(self, wandb: Any, entry: Entry, group: str) -> None:
        if self.mode == "offline":
            # an interrupted mirror or an older front may have left this id, which must not exist twice
            for old in (self.folder / "wandb").glob(f"offline-run-*-{entry.id}"):
                shutil.rmtree(old)
        run = wandb.init(
            id=entry.id,
            name=entry.name[:NAME_LENGTH],
            group=plain(group)[:NAME_LENGTH],
            job_type=entry.kind,
            project=self.project,
            entity=self.entity,
            config=dict(entry.config),
            tags=list(entry.tags),
            dir=str(self.folder),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",
            settings=settings(wandb, self.mode, self.folder),
        )
        try:
            if entry.table is not None:
                columns, rows = entry.table
                logged: dict[str, Any] = {"front": wandb.Table(columns=list(columns), data=[list(row) for row in rows])}
                if entry.plot is not None:
                    from plotly.graph_objects import Figure

                    logged["front_plot"] = wandb.Plotly(Figure(entry.plot))
                run.log(logged)
            run.summary.update(dict(entry.summary))
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish(exit_code=1 if entry.failed else 0)

    @property
    def _digests_file(self) -> Path:
        return self.folder / "mirrored.json"

    @property
    def _target(self) -> str:
        return f"{self.mode}:{self.entity or ''}/{self.project}"

    def _read_digests(self) -> dict[str, str]:
        """Returns the digests of the runs that this target already has, by run id."""
        try:
            digests = json.loads(self._digests_file.read_text())[self._target]
            return {str(key): str(value) for key, value in digests.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # without digests all runs are written again

    def _write_digests(self, digests: Mapping[str, str]) -> None:
        try:
            all_digests = json.loads(self._digests_file.read_text())
        except (OSError, ValueError):
            all_digests = {}
        all_digests = (all_digests if isinstance(all_digests, dict) else {}) | {self._target: dict(digests)}
        write_json(self._digests_file, all_digests, indent=1)
