"""Manages the folders of trials, `trials/<number>/`: writes the files that the search puts there, and removes weights."""

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

MESSAGES = "messages.json"  # the conversation with a language model that led to the strategy
LATEST_COMPLETE = 64  # complete trials besides the front in `rivals.json`


class Folders:
    """The folders of the trials below `root`, or the folder `below` in each of them."""

    def __init__(self, root: Path, below: str = "") -> None:
        self._root, self._below = root, below

    def of(self, number: int) -> Path:
        return self._root / str(number) / self._below

    def spent(self, number: int) -> Mapping[str, float]:
        """Returns the energy of a cancelled job; empty if the job did not write it."""
        return read_spent(self.of(number))

    def prepare(self, number: int, history: History, model: str | None = None) -> None:
        """Writes `rivals.json` for a trial: the base model's figures, the front, and the divergences of trials scored on all items.

        `model`: the hash of the base model (`LM.sha256`).
        """
        self.of(number).mkdir(parents=True, exist_ok=True)
        base = history.base
        snapshot = {
            "model": model,
            "base": {"number": base.number, "figures": dict(base.figures)} if base is not None else None,
            "front": [
                {"number": t.number, "figures": dict(t.figures), "sources": dict(t.sources)} for t in history.on_front
            ],
            "scored": scored_divergences(history),
        }
        write_json(self.of(number) / RIVALS, snapshot)

    def keep_messages(self, number: int, messages: Mapping[str, Any]) -> None:
        if messages:
            self.of(number).mkdir(parents=True)
            write_json(self.of(number) / MESSAGES, messages, indent=1)

    def cancel(self, number: int) -> None:
        """Cancels a trial, on whatever machine it runs."""
        with contextlib.suppress(OSError):
            self.of(number).mkdir(parents=True, exist_ok=True)
            (self.of(number) / STOP).touch()

    def clear(self, number: int, keep: str = "") -> None:
        """Removes the contents of a trial's folder except the file `keep`, and the folder if there is no such file."""
        folder = self.of(number)
        if not (folder / keep).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != keep:
                path.unlink(missing_ok=True)

    def drop_weights(self, numbers: set[int]) -> None:
        """Removes the weights of trials; manifests and figures stay."""
        for artifact in self._root.glob("*/artifact"):
            if int(artifact.parent.name) in numbers:
                shutil.rmtree(artifact, ignore_errors=True)


def scored_divergences(history: History) -> dict[int, float | None]:
    """Returns the divergences of trials that were scored on all items (the front and the latest), by trial number."""
    latest = itertools.islice((t for t in reversed(history.trials) if t.complete), LATEST_COMPLETE)
    return {t.number: t.figures.get(KL) for t in (*history.on_front, *latest)}
