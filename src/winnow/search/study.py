"""The study: an Optuna study in Optuna's own storage, the single source of truth of a search.

A trial is *finished* once its record is in the storage (one write); everything before that can be lost to a kill and is made up
for on the next start, nothing after it can. Views (`front.json`, `report.html`, W&B) are rebuilt from here at any time.
"""

from __future__ import annotations

import json
import math
import sqlite3
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.agent.policy import Suggestion
from winnow.search import pareto
from winnow.search.history import History
from winnow.search.space import Space, distributions
from winnow.types import Objective, Reason, Strategy, Summary, Trial, UserError

if TYPE_CHECKING:
    import optuna

_RECORD, _STRATEGY, _LOST, _BY, _DECISION = "record", "strategy", "lost", "proposed_by", "decision"


@dataclass(frozen=True)
class Proposal:
    """A suggestion that will be tried, with the number it has in the study."""

    number: int
    suggestion: Suggestion

    @property
    def strategy(self) -> Strategy:
        return self.suggestion.strategy


class Study(History):
    """A history in Optuna's storage, and the means to add to it. Trials have the numbers that the storage gives them."""

    def __init__(
        self,
        study: optuna.Study,
        objectives: Sequence[Objective],
        fingerprint: Mapping[str, Any],
        limits: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(objectives, limits)
        self._study = study
        self.fingerprint = fingerprint
        self._ids: dict[int, int] = {}  # of unfinished trials, in the storage, by number
        for frozen in study.get_trials(deepcopy=False):
            self.proposals += 1
            self.spend(frozen.user_attrs.get(_DECISION, {}))
            if _RECORD in frozen.user_attrs:
                self.end(trial_from_json(frozen.user_attrs[_RECORD]))

    @property
    def name(self) -> str:
        return str(self._study.study_name)

    def reserve(self, suggestion: Suggestion, space: Space) -> Proposal:
        """Writes down that a strategy is being tried, in one write, and gives it its number."""
        import optuna

        chosen, known = space.parameters(suggestion.strategy), distributions(space)
        decision = {"why": suggestion.why, "expected_gain": suggestion.expected_gain, **suggestion.record}
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=chosen,
            distributions={name: known[name] for name in chosen},
            user_attrs={
                _BY: suggestion.by,
                _STRATEGY: _strategy_json(suggestion.strategy),
                _DECISION: decision,
            },
        )
        storage = self._study._storage
        identity = storage.create_new_trial(self._study._study_id, template)
        number = storage.get_trial_number_from_id(identity)
        self._ids[number] = identity
        self.begin(number, suggestion.strategy, suggestion.record)
        return Proposal(number, suggestion)

    def record(self, trial: Trial) -> None:
        """Makes a trial finished."""
        identity = self._ids.pop(trial.number)
        self._study._storage.set_trial_user_attr(identity, _RECORD, trial_json(trial))
        self._tell(identity, trial)
        self.end(trial)

    def _tell(self, identity: int, trial: Trial) -> None:
        from optuna.trial import TrialState

        # a stopped trial has no values: in Optuna's terms it was pruned
        state = TrialState.COMPLETE if trial.complete else TrialState.PRUNED if trial.stopped else TrialState.FAIL
        values = [trial.figures[o.name] for o in self.objectives] if trial.complete else None
        self._study._storage.set_trial_state_values(identity, state, values)

    def recover(self, finished: Callable[[int, Suggestion], Trial | None]) -> tuple[list[int], list[Suggestion]]:
        """Settles what a killed search left behind: the numbers of the trials that are lost, and what is to be tried again.

        Args:
            finished: given a number and what was suggested, the trial if its outcome had already reached the disk.
        """
        from optuna.trial import TrialState

        lost, again = [], {}
        for frozen in self._study.get_trials(deepcopy=False):
            attributes = frozen.user_attrs
            if _STRATEGY not in attributes:
                continue
            number, strategy = frozen.number, _strategy_from(attributes[_STRATEGY])
            record = attributes.get(_DECISION, {})
            suggestion = Suggestion(strategy, attributes[_BY], record=record)
            repeated = Suggestion(strategy, attributes[_BY], record={**record, "again": number})
            if frozen.state is TrialState.RUNNING:
                self._ids[number] = frozen._trial_id
                if _RECORD in attributes:
                    self._tell(self._ids.pop(number), trial_from_json(attributes[_RECORD]))
                elif (found := finished(number, suggestion)) is not None:
                    self.record(found)
                else:
                    identity = self._ids.pop(number)
                    self._study._storage.set_trial_user_attr(identity, _LOST, True)
                    self._study._storage.set_trial_state_values(identity, TrialState.FAIL, None)
                    lost.append(number)
                    again[strategy.overrides] = repeated
            elif attributes.get(_LOST):
                again[strategy.overrides] = repeated
        self.trials.sort(key=lambda t: t.number)
        return lost, [suggestion for overrides, suggestion in again.items() if overrides not in self.seen]

    def summary(self) -> Summary:
        trials = tuple(sorted(self.trials, key=lambda t: t.number))
        return Summary(
            name=self.name,
            fingerprint=self.fingerprint,
            objectives=self.objectives,
            trials=trials,
            front=self.front,
            hypervolume=pareto.hypervolume_series(trials, self.objectives),
        )


def open_study(
    name: str,
    storage: str,
    objectives: Sequence[Objective],
    fingerprint: Mapping[str, Any],
    limits: Mapping[str, float] | None = None,
    option: str = "study",
) -> Study:
    """Opens or creates a study.

    Args:
        storage: an Optuna storage URL; `sqlite:///...` files are checked for damage first.

    Raises:
        UserError: the storage is damaged or cannot be reached, or holds a study of another model, benchmark, hardware or
            objectives (the difference is named).
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage.startswith("sqlite:///"):
        check_sqlite(Path(storage.removeprefix("sqlite:///")))
    directions = [o.direction for o in objectives]
    wanted = {"fingerprint": dict(fingerprint), "objectives": [asdict(o) for o in objectives]}
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
        if "fingerprint" in study.user_attrs:
            held = {"fingerprint": study.user_attrs["fingerprint"], "objectives": study.user_attrs["objectives"]}
            differences = _differences(held, json.loads(json.dumps(wanted)))
            if differences:
                raise UserError(
                    f"{option}={name} holds trials of other settings ({'; '.join(differences[:4])}); they cannot be "
                    f"compared: give this search a name of its own with {option}=NAME, or go back to the settings it had"
                )
        else:
            for key, value in wanted.items():
                study.set_user_attr(key, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([o.name for o in objectives])  # optuna-dashboard shows them
    except SQLAlchemyError as error:
        raise UserError(f"the study's storage {storage} cannot be used: {str(error).splitlines()[0]}") from error
    return Study(study, objectives, fingerprint, limits)


def recorded(name: str, storage: str) -> list[tuple[int, Suggestion]]:
    """What was proposed in a study, in order: the number of each trial, and why it was made. Nothing is written.

    Raises:
        UserError: there is no such study, or it cannot be read.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage.startswith("sqlite:///"):
        check_sqlite(Path(storage.removeprefix("sqlite:///")))
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise UserError(f"{storage} holds no study of the name {name}") from None
    except SQLAlchemyError as error:
        raise UserError(f"the storage {storage} cannot be read: {str(error).splitlines()[0]}") from error
    found: dict[tuple[str, ...], tuple[int, Suggestion]] = {}
    for frozen in study.get_trials(deepcopy=False):
        attributes = frozen.user_attrs
        if _STRATEGY in attributes:
            strategy, decision = _strategy_from(attributes[_STRATEGY]), attributes.get(_DECISION, {})
            suggestion = Suggestion(strategy, attributes[_BY], "", decision.get("expected_gain"), decision)
            found.setdefault(strategy.overrides, (frozen.number, suggestion))
    return list(found.values())


def check_sqlite(path: Path) -> None:
    """Raises UserError if a study's file is there and is not a whole SQLite database."""
    if not path.exists():
        return
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
        connection.close()
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise UserError(
            f"{path} is damaged ({verdict}); move it away to start afresh, or restore a copy. The trials' folders beside it "
            f"keep their figures"
        )


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


def _strategy_json(strategy: Strategy) -> dict[str, Any]:
    return {"methods": list(strategy.methods), "knobs": dict(strategy.knobs)}


def _strategy_from(data: Mapping[str, Any]) -> Strategy:
    return Strategy(tuple(data["methods"]), dict(data["knobs"]))


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as plain JSON; figures that are not finite become None."""
    figures = {k: v if math.isfinite(v) else None for k, v in trial.figures.items()}
    return {
        "number": trial.number,
        "strategy": _strategy_json(trial.strategy),
        "figures": figures,
        "sources": dict(trial.sources),
        "reason": trial.reason.value if trial.reason else None,
        "message": trial.message,
        "estimates": dict(trial.estimates),
        "seconds": dict(trial.seconds),
        "energy": dict(trial.energy),
        "stages": [dict(stage) for stage in trial.stages],
        "commands": list(trial.commands),
        "proposed_by": trial.proposed_by,
        "decision": dict(trial.decision),
    }


def trial_from_json(data: Mapping[str, Any]) -> Trial:
    """The inverse of `trial_json`."""
    return Trial(
        number=data["number"],
        strategy=_strategy_from(data["strategy"]),
        figures={k: math.nan if v is None else v for k, v in data["figures"].items()},
        sources=data["sources"],
        reason=Reason(data["reason"]) if data["reason"] else None,
        message=data["message"],
        estimates=data["estimates"],
        seconds=data["seconds"],
        energy=data["energy"],
        stages=tuple(data["stages"]),
        commands=tuple(data["commands"]),
        proposed_by=data["proposed_by"],
        decision=data["decision"],
    )
