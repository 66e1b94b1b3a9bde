"""Whether the files of a study's trials lie in `outputs`, wherever the study itself is kept.

A trial needs files of others: the outcomes of their items to race against, their weights to confirm them. A study may be kept on a
database server, or in a file elsewhere, and so be opened where those are not: on a machine with an `outputs` of its own, or after
the folder was deleted. So the study and the folder of its trials hold the same token; the first search puts it there. What moves
with the folder, as `study.db` does by default, fits wherever it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from winnow.study.study import Study

FILE = "study.json"  # beside the folders of the trials


def make(folder: Path) -> None:
    """Makes a folder that studies lie in.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"outputs={folder.parent}: cannot write there ({error.strerror}); choose another place"
        ) from error


def claim(study: Study, folder: Path) -> None:
    """Makes the folder of a study, and makes it the one that its trials lie in unless they already lie elsewhere.

    Raises:
        UserError: they do, or nothing can be written there.
    """
    home = study.home
    # trials that have run before there were tokens are known by what they left
    if _in_use(study) and (home is not None or not any((folder / "trials").glob("*/outcome.json"))):
        check(study, folder)
        return
    make(folder)
    token = _token(folder) or _written(folder)
    if home is None or home["token"] != token:
        study.move_in({"token": token, "began": f"{folder.resolve()} on {platform.node()}"})


def check(study: Study, folder: Path) -> None:
    """Raises UserError if the files of a study's trials do not lie in this folder, or no longer do."""
    home: Mapping[str, Any] = study.home or {}
    found = _token(folder)
    if found is not None and found == home.get("token"):
        return
    raise UserError(
        f"outputs={folder.parent}: the trials of study={study.name} need one another's files, and {folder / 'trials'} "
        f"{'belongs to another study' if found else 'does not hold them'}; they began in {home.get('began', 'another place')}. "
        f"Give the outputs=FOLDER that has them (all machines of a study must share it), or a new study=NAME"
    )


def _in_use(study: Study) -> bool:
    """Whether there is anything that later trials may need."""
    return bool(study.running) or any(trial.complete for trial in study.trials)


def _token(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "trials" / FILE).read_text(encoding="utf-8"))["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _written(folder: Path) -> str:
    """Puts a token there; of two searches that begin at once the first one's stays."""
    path = folder / "trials" / FILE
    scratch = path.with_name(f".{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps({"token": uuid.uuid4().hex}) + "\n", encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)  # never over another one
    except OSError:  # a file system without links
        scratch.replace(path)
    scratch.unlink(missing_ok=True)
    token = _token(folder)
    if token is None:
        raise UserError(f"{path} cannot be read; remove it, or give another folder with outputs=FOLDER")
    return token
