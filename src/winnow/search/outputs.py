"""Checks that the files of a study's trials lie in `outputs`, wherever the study itself is stored.

A trial needs files of other trials: their item outcomes for races, their weights for confirmation. A study may be stored on a
database server or in a file elsewhere, and so can be opened where these files are missing: on a machine with its own `outputs`, or
after the folder was deleted. Therefore the study and the folder of its trials hold the same token, which the first search writes. A
study that moves together with the folder, as `study.db` does by default, fits at any place.
"""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.files import write_first

if TYPE_CHECKING:
    from winnow.study.study import Study

FILE = "study.json"  # beside the folders of the trials


def make_folder(folder: Path) -> None:
    """Creates a folder for studies.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"outputs={folder.parent}: cannot write there ({error.strerror}); choose another place"
        ) from error


def claim(study: Study, folder: Path) -> None:
    """Creates the folder of a study and binds the study's trials to it, unless they already lie in another folder.

    Raises:
        UserError: the trials lie in another folder, or this one cannot be written.
    """
    home = study.home
    # trials from before tokens existed are recognised by their outcomes
    if _in_use(study) and (home is not None or not any((folder / "trials").glob("*/outcome.json"))):
        check(study, folder)
        return
    make_folder(folder)
    token = _read_token(folder) or _write_token(folder)
    if home is None or home["token"] != token:
        study.set_home({"token": token, "began": f"{folder.resolve()} on {platform.node()}"})


def check(study: Study, folder: Path) -> None:
    """Raises UserError if the files of a study's trials do not lie in this folder, or no longer do."""
    home: Mapping[str, Any] = study.home or {}
    token = _read_token(folder)
    if token is not None and token == home.get("token"):
        return
    raise UserError(
        f"outputs={folder.parent}: the trials of study={study.name} need one another's files, and {folder / 'trials'} "
        f"{'belongs to another study' if token else 'does not hold them'}; they began in {home.get('began', 'another place')}. "
        f"Give the outputs=FOLDER that has them (all machines of a study must share it), or a new study=NAME"
    )


def _in_use(study: Study) -> bool:
    """Returns whether the study has trials whose files later trials may need."""
    return bool(study.running) or any(trial.complete for trial in study.trials)


def _read_token(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "trials" / FILE).read_text(encoding="utf-8"))["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_token(folder: Path) -> str:
    """Writes a token and returns the one that is there: of two searches that begin at once, the first one wins."""
    path = folder / "trials" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_first(path, json.dumps({"token": uuid.uuid4().hex}) + "\n")
    token = _read_token(folder)
    if token is None:
        raise UserError(f"{path} cannot be read; remove it, or give another folder with outputs=FOLDER")
    return token
