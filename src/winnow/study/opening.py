"""Opens a study: creates a new one, and compares the settings of an existing one with those of this search."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from winnow.core.errors import UserError
from winnow.core.types import Objective
from winnow.study import storage
from winnow.study.serialization import fingerprint_from_json
from winnow.study.study import Study


def open_study(
    name: str,
    url: str,
    objectives: Sequence[Objective],
    fingerprint: Mapping[str, Any],
    limits: Mapping[str, float] | None = None,
    option: str = "study",
) -> Study:
    """Opens or creates a study.

    Args:
        url: URL of an Optuna storage; `sqlite:///...` files are checked for damage first.
        option: the option that names the study, for error messages.

    Raises:
        UserError: the storage is damaged or cannot be reached, or holds a study of another model, benchmark, hardware or
            objectives (the message names the difference).
    """
    import optuna

    study = storage.connect(name, url, [o.direction for o in objectives])
    settings = {"fingerprint": dict(fingerprint), "objectives": [asdict(o) for o in objectives]}
    with storage.as_user_errors(url):
        if "fingerprint" not in study.user_attrs:
            for key, value in settings.items():
                study.set_user_attr(key, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([o.name for o in objectives])  # optuna-dashboard shows them
        stored = {key: study.user_attrs[key] for key in settings}  # another search may have stored its settings first
        compared = stored | {"fingerprint": fingerprint_from_json(stored["fingerprint"])}
        differences = _differences(compared, json.loads(json.dumps(settings)))
        if differences:
            raise UserError(
                f"{option}={name} holds trials of other settings ({'; '.join(differences[:4])}); they cannot be "
                f"compared: give this search a name of its own with {option}=NAME, or go back to the settings it had"
            )
        # the fingerprint as stored: the ids of the study's W&B runs follow from it
        return Study(study, objectives, stored["fingerprint"], limits, "" if storage.sqlite_file(url) else url)


def _differences(stored: Any, current: Any, key: str = "") -> list[str]:
    """Returns one phrase for each setting that differs, by its dotted key."""
    if isinstance(stored, dict) and isinstance(current, dict):
        differences = []
        for name in [*stored, *(k for k in current if k not in stored)]:
            differences += _differences(
                stored.get(name), current.get(name), f"{key}.{name}".strip(".").removeprefix("fingerprint.")
            )
        return differences
    if key == "objectives" and stored != current:
        stored, current = ([o["name"] for o in side] for side in (stored, current))
    return [f"{key}: {_brief(stored)} there, {_brief(current)} here"] if stored != current else []


def _brief(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
