"""Opens a study: made where it is new, compared with what is wanted of it where it is not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from winnow.core.errors import UserError
from winnow.core.types import Objective
from winnow.study import storage
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
        url: of an Optuna storage; `sqlite:///...` files are checked for damage first.

    Raises:
        UserError: the storage is damaged or cannot be reached, or holds a study of another model, benchmark, hardware or
            objectives (the difference is named).
    """
    import optuna

    study = storage.connect(name, url, [o.direction for o in objectives])
    wanted = {"fingerprint": dict(fingerprint), "objectives": [asdict(o) for o in objectives]}
    with storage.reaching(url):
        if "fingerprint" not in study.user_attrs:
            for key, value in wanted.items():
                study.set_user_attr(key, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([o.name for o in objectives])  # optuna-dashboard shows them
        held = {key: study.user_attrs[key] for key in wanted}  # another search may have been faster
        differences = _differences(held, json.loads(json.dumps(wanted)))
        if differences:
            raise UserError(
                f"{option}={name} holds trials of other settings ({'; '.join(differences[:4])}); they cannot be "
                f"compared: give this search a name of its own with {option}=NAME, or go back to the settings it had"
            )
        return Study(study, objectives, fingerprint, limits, "" if storage.sqlite_file(url) else url)


def _differences(held: Any, wanted: Any, key: str = "") -> list[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        found = []
        for name in [*held, *(k for k in wanted if k not in held)]:
            found += _differences(
                held.get(name), wanted.get(name), f"{key}.{name}".strip(".").removeprefix("fingerprint.")
            )
        return found
    if key == "objectives" and held != wanted:
        held, wanted = ([o["name"] for o in side] for side in (held, wanted))
    return [f"{key}: {_brief(held)} there, {_brief(wanted)} here"] if held != wanted else []


def _brief(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
