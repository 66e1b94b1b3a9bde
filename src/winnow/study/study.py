"""Keeps the history of a search in an Optuna study, the single source of truth of the search.

A trial is *finished* once its record is in the storage (one write). A kill before that write loses the trial, and the next start
repeats it; a kill after it loses nothing. Views (`front.json`, `report.html`, W&B) are rebuilt from the study at any time.
On a database server several searches may write to one study (`winnow.study.storage`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.core.types import Objective, Strategy, Summary, Trial
from winnow.study import pareto, storage
from winnow.study.history import History
from winnow.study.policy import Suggestion
from winnow.study.serialization import strategy_from_json, strategy_json, trial_from_json, trial_json
from winnow.study.space import Space, distributions
from winnow.study.trial_store import (
    HEARTBEAT,
    LOST,
    PROPOSAL,
    RECORD,
    WITHDRAWN,
    TrialStore,
    repeated_suggestion,
    suggestion_from,
)

if TYPE_CHECKING:
    import optuna

# user attributes of the study
_CONFIRMED = "confirmed"  # scores on holdout items
_SPACE = "space"  # the space that is searched, and the first trial of it
_HOME = "home"  # identifies the folder with the trials' files
_ENERGY = "energy"  # used by confirmations, and by trials without an outcome


@dataclass(frozen=True)
class Proposal:
    """A suggestion that will be tried, with its trial number in the study."""

    number: int
    suggestion: Suggestion

    @property
    def strategy(self) -> Strategy:
        return self.suggestion.strategy


class Study(History):
    """A history in Optuna's storage, with methods that add to it. The storage numbers the trials.

    Args:
        url: URL of a storage that other searches may write to as well; empty if this search is the only writer.

    Attributes:
        confirmed: scores on holdout items, by trial number.
        unconfirmed: why a trial of the front could not be scored on holdout items, by trial number.
    """

    def __init__(
        self,
        study: optuna.Study,
        objectives: Sequence[Objective],
        fingerprint: Mapping[str, Any],
        limits: Mapping[str, float] | None = None,
        url: str = "",
    ) -> None:
        super().__init__(objectives, limits)
        self._study, self._url = study, url
        self._store = TrialStore(study)
        self.fingerprint = fingerprint
        self.confirmed: dict[int, dict[str, float]] = {
            int(number): figures for number, figures in study.user_attrs.get(_CONFIRMED, {}).items()
        }
        self.unconfirmed: dict[int, str] = {}
        self.add_energy(study.user_attrs.get(_ENERGY, {}))
        self._ids: dict[int, int] = {}  # trial number -> id in the storage, of this search's unfinished trials
        self._foreign: dict[int, optuna.trial.FrozenTrial] = {}  # unfinished trials of other searches, alive or dead
        self._settled: set[int] = set()  # numbers of the trials that have ended
        self._newly_finished: list[Trial] = []
        self._heartbeats = storage.HeartbeatMonitor()
        self._synchronise()
        self._newly_finished.clear()
        self._abandoned = self._lost_suggestions()
        if url:
            threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    @property
    def name(self) -> str:
        return str(self._study.study_name)

    def reserve(self, suggestion: Suggestion, space: Space) -> Proposal | None:
        """Stores a suggestion as a running trial, in one write, and returns it with its trial number.

        Returns None if another search has just started the same strategy: the trial with the lower number goes on.
        """
        decision = {"why": suggestion.why, "expected_gain": suggestion.expected_gain, **suggestion.record}
        proposal = {
            "by": suggestion.by,
            "strategy": strategy_json(suggestion.strategy),
            "decision": decision,
            "owner": storage.process_signature() if self._url else None,
        }
        with self._storage_errors():
            trial_id = self._store.create(
                space.parameters(suggestion.strategy), distributions(space), {PROPOSAL: proposal}
            )
            number = self._store.number(trial_id)
            self._ids[number] = trial_id
            if self._url and (earlier := self._earlier_duplicate(number, suggestion.strategy)) is not None:
                self._store.fail(self._ids.pop(number), WITHDRAWN, earlier)
                self._settled.add(number)
                self.proposals += 1
                self.add_llm_usage(suggestion.record)
                return None
        self.begin(number, suggestion.strategy, suggestion.record)
        return Proposal(number, suggestion)

    def enter_space(self, space: Space) -> bool:
        """Stores which space is searched from now on; returns True if the study has trials of another space.

        Only trials of the current space count for `since_gain`: earlier ones do not show what this space gains.
        """
        with self._storage_errors():
            stored, description = self._study.user_attrs.get(_SPACE), space.description()
            changed = stored is not None and stored["space"] != description
            if stored is None or changed:
                first = 1 + max((t.number for t in self.trials), default=-1) if changed else 0
                stored = {"space": description, "from": first}
                self._study.set_user_attr(_SPACE, stored)
        runs = sum(self.counts_as_run(t) for t in self.trials if t.number >= stored["from"])
        self.since_gain = min(self.since_gain, runs)
        return changed

    def record(self, trial: Trial) -> bool:
        """Stores a finished trial; returns False if another search has already declared it lost."""
        from optuna.exceptions import UpdateFinishedTrialError

        trial_id = self._ids.pop(trial.number)
        self._settled.add(trial.number)
        try:
            with self._storage_errors():
                self._store.set_attribute(trial_id, RECORD, trial_json(trial))
                self._store.finish(trial_id, trial, self.objectives)
        except UpdateFinishedTrialError:
            self._drop(trial.number)
            return False
        self.end(trial)
        return True

    def confirm(self, number: int, figures: Mapping[str, float]) -> None:
        """Stores what a trial scored on holdout items."""
        with self._storage_errors():
            stored = self._study.user_attrs.get(_CONFIRMED, {})  # other searches confirm, too
            self.confirmed |= {int(other): scores for other, scores in stored.items()} | {number: dict(figures)}
            self._study.set_user_attr(_CONFIRMED, {str(n): scores for n, scores in self.confirmed.items()})

    @property
    def home(self) -> Mapping[str, Any] | None:
        """What identifies the folder of the trials (`winnow.search.outputs`); None before a search has set it."""
        with self._storage_errors():
            return self._study.user_attrs.get(_HOME)  # type: ignore[no-any-return]

    def set_home(self, home: Mapping[str, Any]) -> None:
        with self._storage_errors():
            self._study.set_user_attr(_HOME, dict(home))

    def record_energy(self, energy: Mapping[str, float]) -> None:
        """Counts and stores the energy of work that belongs to no finished trial."""
        if energy:
            self.add_energy(energy)
            with self._storage_errors():
                stored = self._study.user_attrs.get(_ENERGY, {})
                self._study.set_user_attr(
                    _ENERGY, {name: stored.get(name, 0.0) + energy.get(name, 0.0) for name in ("wh", "co2_g")}
                )

    def refresh(self) -> list[Trial]:
        """Reads what other searches have started and finished; returns the trials finished since the last call."""
        if self._url:
            with self._storage_errors():
                self._synchronise()
        finished, self._newly_finished = self._newly_finished, []
        return finished

    def recover(self, finished: Callable[[int, Suggestion], Trial | None]) -> tuple[list[int], list[Suggestion]]:
        """Settles the trials of dead searches; returns the numbers of the lost trials, and what should be tried again.

        Args:
            finished: returns the trial with this number and suggestion if its outcome is already on the disk, else None.
        """
        lost: list[int] = []
        again, self._abandoned = self._abandoned, {}
        dead = {number: frozen for number, frozen in self._foreign.items() if self._is_dead(frozen)}
        for number, frozen in dead.items():
            suggestion, attributes = suggestion_from(frozen), frozen.user_attrs
            with self._storage_errors():
                if RECORD in attributes:
                    self._adopt(frozen, trial_from_json(attributes[RECORD]))
                elif (trial := finished(number, suggestion)) is not None:
                    self._adopt(frozen, trial)
                elif self._store.fail(frozen._trial_id, LOST, True):
                    self._foreign.pop(number)
                    self._settled.add(number)
                    self._drop(number)
                    lost.append(number)
                    again[suggestion.strategy.overrides] = repeated_suggestion(frozen)
        if dead:
            self.trials.sort(key=lambda t: t.number)
        return lost, [suggestion for overrides, suggestion in again.items() if overrides not in self.proposed]

    def _adopt(self, frozen: optuna.trial.FrozenTrial, trial: Trial) -> None:
        """Records the finished trial of a dead search."""
        self._foreign.pop(trial.number)
        self._ids[trial.number] = frozen._trial_id
        if self.record(trial):
            self._newly_finished.append(trial)
        else:
            self._settled.discard(trial.number)  # another search has settled it: the next synchronisation reads how

    def _synchronise(self) -> None:
        """Updates this history from the storage."""
        for frozen in self._store.trials():
            number, attributes = frozen.number, frozen.user_attrs
            if number in self._settled or number in self._ids:
                continue
            is_new = number not in self._foreign
            if is_new:
                self._store.learn(frozen)
                self.proposals += 1
                self.add_llm_usage(attributes.get(PROPOSAL, {}).get("decision", {}))
            if frozen.state.is_finished() or PROPOSAL not in attributes:
                self._foreign.pop(number, None)
                self._settled.add(number)
                if RECORD in attributes:
                    trial = trial_from_json(attributes[RECORD])
                    self.end(trial)
                    self._newly_finished.append(trial)
                elif not is_new:
                    self._drop(number)
            else:
                self._foreign[number] = frozen
                self.running[number] = strategy_from_json(attributes[PROPOSAL]["strategy"])
                self.proposed.add(self.running[number].overrides)

    def _lost_suggestions(self) -> dict[tuple[str, ...], Suggestion]:
        """Returns the suggestions of trials that an earlier search has lost, by the overrides of their strategies."""
        frozen_trials = self._store.trials()
        suggestions = [repeated_suggestion(frozen) for frozen in frozen_trials if frozen.user_attrs.get(LOST)]
        return {s.strategy.overrides: s for s in suggestions}

    def _earlier_duplicate(self, number: int, strategy: Strategy) -> int | None:
        """Returns the trial of the same strategy that another search has started since the last update, if it came first."""
        before = {*self.running, *self._settled}
        self._synchronise()
        started = {**self.running, **{t.number: t.strategy for t in self._newly_finished}}
        earlier = (
            n for n, s in started.items() if n not in before and n < number and s.overrides == strategy.overrides
        )
        return min(earlier, default=None)

    def _is_dead(self, frozen: optuna.trial.FrozenTrial) -> bool:
        """Returns True if no process works on the trial any more."""
        owner = frozen.user_attrs[PROPOSAL]["owner"]
        if not self._url or owner is None or storage.has_ended(owner):
            return True
        return self._heartbeats.is_overdue(frozen.number, frozen.user_attrs.get(HEARTBEAT))

    def _drop(self, number: int) -> None:
        """Removes a trial without an outcome: its strategy may be proposed again, unless another trial has it, too."""
        strategy = self.running.pop(number)
        strategies = (*self.running.values(), *(trial.strategy for trial in self.trials))
        if all(strategy.overrides != other.overrides for other in strategies):
            self.proposed.discard(strategy.overrides)

    def _send_heartbeats(self) -> None:
        """Shows other searches that this one is alive; runs in its own thread, since a proposal may take minutes."""
        beat = 0
        while True:
            time.sleep(storage.BEAT_S)
            beat += 1
            for trial_id in list(self._ids.values()):
                # the trial may have finished; if the storage cannot be reached, the search itself raises the error
                with contextlib.suppress(Exception):
                    self._store.set_attribute(trial_id, HEARTBEAT, beat)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        with storage.as_user_errors(self._url) if self._url else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """Closes the storage; SQLite then merges its write-ahead log into the database file."""
        self._store.close()

    def summary(self) -> Summary:
        trials = tuple(sorted(self.trials, key=lambda t: t.number))
        return Summary(
            name=self.name,
            fingerprint=self.fingerprint,
            objectives=self.objectives,
            trials=trials,
            front=self.front,
            hypervolume=pareto.hypervolume_series(trials, self.objectives),
            confirmed=self.confirmed,
            unconfirmed=self.unconfirmed,
            energy={"wh": self.energy_wh, "co2_g": self.co2_g},
        )
