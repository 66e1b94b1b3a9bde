"""The folders of trials, `trials/<number>/`: what the search puts into them beside what the trials write themselves."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.core.files import write_json
from winnow.search.job import RIVALS, STOP, read_spent
from winnow.study.history import History
from winnow.study.objectives import KL

MESSAGES = "messages.json"  # what was said with a language model to come to the strategy
LATEST = 64  # complete trials that a new one is told of, beside the front


class Folders:
    """Those of trials, or those of one name that lie `below` them."""

    def __init__(self, root: Path, below: str = "") -> None:
        self._root, self._below = root, below

    def of(self, number: int) -> Path:
        return self._root / str(number) / self._below

    def spent(self, number: int) -> Mapping[str, float]:
        """The energy of a job that was cancelled, as far as it could still say so."""
        return read_spent(self.of(number))

    def prepare(self, number: int, history: History, model: str | None = None) -> None:
        """Tells a trial what the base model's has found, whom it has to beat, and who can tell it which items matter.

        `model`: what the base model is known by (`LM.sha256`).
        """
        self.of(number).mkdir(parents=True, exist_ok=True)
        base = history.base
        told = {
            "model": model,
            "base": {"number": base.number, "figures": dict(base.figures)} if base is not None else None,
            "front": [
                {"number": t.number, "figures": dict(t.figures), "sources": dict(t.sources)} for t in history.on_front
            ],
            "scored": scored(history),
        }
        write_json(self.of(number) / RIVALS, told)

    def keep_messages(self, number: int, messages: Mapping[str, Any]) -> None:
        if messages:
            self.of(number).mkdir(parents=True)
            write_json(self.of(number) / MESSAGES, messages, indent=1)

    def cancel(self, number: int) -> None:
        """Tells a trial, wherever it runs, that nobody waits for it any more."""
        with contextlib.suppress(OSError):
            self.of(number).mkdir(parents=True, exist_ok=True)
            (self.of(number) / STOP).touch()

    def clear(self, number: int, kept: str = "") -> None:
        """Removes what lies in a trial's folder, and the folder if nothing is kept."""
        folder = self.of(number)
        if not (folder / kept).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != kept:
                path.unlink(missing_ok=True)

    def drop_weights(self, numbers: set[int]) -> None:
        """Removes the weights of trials; manifest and figures stay."""
        for artifact in self._root.glob("*/artifact"):
            if int(artifact.parent.name) in numbers:
                shutil.rmtree(artifact, ignore_errors=True)


def scored(history: History) -> dict[int, float | None]:
    """Divergences of trials that were scored on all items, by number: of the front, and of the latest."""
    latest = itertools.islice((t for t in reversed(history.trials) if t.complete), LATEST)
    return {t.number: t.figures.get(KL) for t in (*history.on_front, *latest)}
