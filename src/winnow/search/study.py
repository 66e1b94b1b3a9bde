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

from winnow.search import pareto
from winnow.search.space import Space
from winnow.types import Objective, Reason, Strategy, Summary, Trial, UserError

if TYPE_CHECKING:
    import optuna

_RECORD, _STRATEGY, _NUMBER, _SKIPPED, _BY = "record", "strategy", "number", "skipped", "proposed_by"


@dataclass(frozen=True)
class Proposal:
    """A strategy that was asked for, with the number it will have in the study."""

    number: int
    strategy: Strategy
    proposed_by: str


class Study:
    """Finished trials, and the means to ask for the next one and to record it."""

    def __init__(self, study: optuna.Study, objectives: Sequence[Objective], fingerprint: Mapping[str, Any]) -> None:
        self._study = study
        self.objectives = tuple(objectives)
        self.fingerprint = fingerprint
        self.trials: list[Trial] = []
        for frozen in study.get_trials(deepcopy=False):
            if _RECORD in frozen.user_attrs:
                self.trials.append(trial_from_json(frozen.user_attrs[_RECORD]))
        self.seen = {trial.strategy.overrides for trial in self.trials}
        # a trial's number counts the strategies that were really run; Optuna's own counts its drafts too
        self._frozen = {f.user_attrs[_NUMBER]: f for f in study.get_trials(deepcopy=False) if _NUMBER in f.user_attrs}

    @property
    def name(self) -> str:
        return str(self._study.study_name)

    @property
    def asked(self) -> int:
        """How many trials were ever asked for: a seed that moves on with every proposal."""
        return len(self._study.get_trials(deepcopy=False))

    def propose(self, space: Space, sampler: optuna.samplers.BaseSampler, by: str) -> Proposal:
        """The next strategy as `sampler` draws it from `space`; one that was tried already is passed over.

        Raises:
            Exhausted: the sampler kept coming back to strategies that were tried.
        """
        import optuna

        for attempt in range(400):
            # a sampler that repeats itself is nudged by plain random draws, so that small spaces are finished
            self._study.sampler = sampler if attempt < 20 else optuna.samplers.RandomSampler(seed=self.asked)
            trial = self._study.ask()
            strategy = space.draw(trial)
            if strategy.overrides not in self.seen:
                number = max(self._frozen, default=-1) + 1
                trial.set_user_attr(_NUMBER, number)
                trial.set_user_attr(_BY, by)
                trial.set_user_attr(_STRATEGY, _strategy_json(strategy))
                self._frozen[number] = self._study.get_trials(deepcopy=False)[trial.number]
                self.seen.add(strategy.overrides)
                return Proposal(number, strategy, by)
            trial.set_user_attr(_SKIPPED, "tried before")
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise Exhausted(f"no untried strategy was found in {attempt + 1} draws; the space seems to be exhausted")

    def propose_strategy(self, space: Space, strategy: Strategy, by: str) -> Proposal:
        """Proposes just this strategy."""
        import optuna

        self._study.enqueue_trial(space.parameters(strategy))
        return self.propose(space, optuna.samplers.RandomSampler(seed=self.asked), by)

    def record(self, trial: Trial) -> None:
        """Makes a trial finished."""
        self._study._storage.set_trial_user_attr(self._frozen[trial.number]._trial_id, _RECORD, trial_json(trial))
        self._tell(trial)
        self.trials.append(trial)
        self.seen.add(trial.strategy.overrides)

    def _tell(self, trial: Trial) -> None:
        import optuna

        number = self._frozen[trial.number].number
        if trial.complete:
            self._study.tell(number, [trial.figures[o.name] for o in self.objectives], skip_if_finished=True)
        else:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def recover(self, finished: Callable[[int, Strategy], Trial | None]) -> list[int]:
        """Settles what a killed search left behind; returns the numbers of the trials that are lost and will be tried again.

        Args:
            finished: given a number and a strategy, the trial if its outcome had already reached the disk.
        """
        import optuna

        lost = []
        for frozen in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            attributes = frozen.user_attrs
            if _RECORD in attributes:
                self._tell(trial_from_json(attributes[_RECORD]))
                continue
            if _STRATEGY not in attributes:
                self._study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                continue
            strategy = _strategy_from(attributes[_STRATEGY])
            number = attributes[_NUMBER]
            found = finished(number, strategy)
            if found is not None:
                self.record(found)
                continue
            self._study._storage.set_trial_user_attr(frozen._trial_id, _SKIPPED, Reason.LOST.value)
            self._study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            self._study.enqueue_trial(frozen.params)
            self.seen.discard(strategy.overrides)
            lost.append(number)
        self.trials.sort(key=lambda t: t.number)
        return lost

    def summary(self) -> Summary:
        trials = tuple(self.trials)
        return Summary(
            name=self.name,
            fingerprint=self.fingerprint,
            objectives=self.objectives,
            trials=trials,
            front=pareto.front(trials, self.objectives),
            hypervolume=pareto.hypervolume_series(trials, self.objectives),
        )


class Exhausted(Exception):
    """Nothing new is left to propose."""


def open_study(
    name: str, storage: str, objectives: Sequence[Objective], fingerprint: Mapping[str, Any], option: str = "study"
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
    return Study(study, objectives, fingerprint)


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
        "seconds": dict(trial.seconds),
        "commands": list(trial.commands),
        "proposed_by": trial.proposed_by,
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
        seconds=data["seconds"],
        commands=tuple(data["commands"]),
        proposed_by=data["proposed_by"],
    )
