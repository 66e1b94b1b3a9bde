"""Writes the trials of a study to Optuna's storage, and reads suggestions back from them.

The user attributes of a trial hold what Optuna has no field for. Each attribute costs a statement, so that what is written
together is one attribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from winnow.core.types import Objective, Trial
from winnow.study.columns import Columns
from winnow.study.policy import Suggestion
from winnow.study.serialization import strategy_from_json

if TYPE_CHECKING:
    import optuna

PROPOSAL, RECORD, LOST = "proposal", "record", "lost"
HEARTBEAT, WITHDRAWN = "beat", "withdrawn"  # used by searches that share a study


class TrialStore:
    """The trials of one Optuna study."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._columns = Columns()

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Returns all trials of the study, as Optuna stores them."""
        trials: list[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def learn(self, frozen: optuna.trial.FrozenTrial) -> None:
        """Remembers the distributions that a trial was stored with."""
        self._columns.learn(frozen.distributions)

    def create(
        self, parameters: Mapping[str, Any], distributions: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> int:
        """Creates a running trial and returns its id in the storage."""
        import optuna

        for last_attempt in (False, True):
            values, stored_distributions = self._columns.assign(parameters, distributions)
            template = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=values,
                distributions=stored_distributions,
                user_attrs=dict(attributes),
            )
            try:
                trial_id: int = self._study._storage.create_new_trial(self._study._study_id, template)
            except ValueError:
                if last_attempt:
                    raise
                for frozen in self.trials():  # another search has just taken one of the names
                    self.learn(frozen)
            else:
                self._columns.learn(stored_distributions)
                return trial_id
        raise AssertionError

    def number(self, trial_id: int) -> int:
        """Returns the number in the study of the trial with this id in the storage."""
        number: int = self._study._storage.get_trial_number_from_id(trial_id)
        return number

    def set_attribute(self, trial_id: int, key: str, value: Any) -> None:
        self._study._storage.set_trial_user_attr(trial_id, key, value)

    def finish(self, trial_id: int, trial: Trial, objectives: Sequence[Objective]) -> None:
        """Sets the final state of a trial, and its values where it is complete."""
        from optuna.trial import TrialState

        # a stopped trial has no values: in Optuna's terms it was pruned
        state = TrialState.COMPLETE if trial.complete else TrialState.PRUNED if trial.stopped else TrialState.FAIL
        values = [trial.figures[o.name] for o in objectives] if trial.complete else None
        self._study._storage.set_trial_state_values(trial_id, state, values)

    def fail(self, trial_id: int, key: str, value: Any) -> bool:
        """Ends a trial without an outcome and sets an attribute; if several searches try, only one gets True."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self._study._storage.set_trial_user_attr(trial_id, key, value)
            return bool(self._study._storage.set_trial_state_values(trial_id, TrialState.FAIL, None))
        except UpdateFinishedTrialError:
            return False

    def close(self) -> None:
        """Closes the storage; SQLite then merges its write-ahead log into the database file."""
        self._study._storage.remove_session()
        backend = getattr(self._study._storage, "_backend", self._study._storage)
        backend.engine.dispose()


def recorded_suggestions(study: optuna.Study) -> list[tuple[int, Suggestion]]:
    """Returns what was proposed in a study, in order: trial number and suggestion, each strategy once."""
    first_by_strategy: dict[tuple[str, ...], tuple[int, Suggestion]] = {}
    for frozen in study.get_trials(deepcopy=False):
        if PROPOSAL in frozen.user_attrs:
            suggestion = suggestion_from(frozen)
            first_by_strategy.setdefault(suggestion.strategy.overrides, (frozen.number, suggestion))
    return list(first_by_strategy.values())


def suggestion_from(frozen: optuna.trial.FrozenTrial) -> Suggestion:
    """Returns the suggestion that a stored trial was started with."""
    proposal = frozen.user_attrs[PROPOSAL]
    decision = proposal["decision"]
    gain = decision.get("expected_gain")
    return Suggestion(strategy_from_json(proposal["strategy"]), proposal["by"], expected_gain=gain, record=decision)


def repeated_suggestion(frozen: optuna.trial.FrozenTrial) -> Suggestion:
    """Returns the suggestion of a lost trial, marked as a repetition of it."""
    suggestion = suggestion_from(frozen)
    return replace(suggestion, record={**suggestion.record, "again": frozen.number})
