"""The study: an Optuna study in Optuna's own storage, the single source of truth of a search.

A trial is *finished* once its record is in the storage (one write); everything before that can be lost to a kill and is made up
for on the next start, nothing after it can. Views (`front.json`, `report.html`, W&B) are rebuilt from here at any time.
On a database server several searches may write to one study (`winnow.study.storage`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from winnow.core.types import Objective, Strategy, Summary, Trial
from winnow.study import pareto, storage
from winnow.study.columns import Columns
from winnow.study.history import History
from winnow.study.policy import Suggestion
from winnow.study.serialization import strategy_from, strategy_json, trial_from_json, trial_json
from winnow.study.space import Space, distributions

if TYPE_CHECKING:
    import optuna

# attributes of a trial in the storage; each costs statements, so what is written together is one
_PROPOSAL, _RECORD, _LOST = "proposal", "record", "lost"
# attributes of the study: scores on items that the search did not use, and which space was searched since when
_CONFIRMED, _SPACE = "confirmed", "space"
_HOME = "home"  # where the files of the trials lie
_ENERGY = "energy"  # of confirmations, and of trials that came to nothing
_BEAT, _WITHDRAWN = "beat", "withdrawn"  # of searches that share a study


@dataclass(frozen=True)
class Proposal:
    """A suggestion that will be tried, with the number it has in the study."""

    number: int
    suggestion: Suggestion

    @property
    def strategy(self) -> Strategy:
        return self.suggestion.strategy


class Study(History):
    """A history in Optuna's storage, and the means to add to it. Trials have the numbers that the storage gives them.

    Args:
        url: of a storage that other searches may write to as well; empty where this is the only one.
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
        self.fingerprint = fingerprint
        # scores on items that the search did not use, by number
        self.confirmed: dict[int, dict[str, float]] = {
            int(number): figures for number, figures in study.user_attrs.get(_CONFIRMED, {}).items()
        }
        self.unconfirmed: dict[int, str] = {}  # why some of the front could not be scored on them, by number
        self.use(study.user_attrs.get(_ENERGY, {}))
        self._ids: dict[int, int] = {}  # of this search's unfinished trials, in the storage, by number
        self._others: dict[int, optuna.trial.FrozenTrial] = {}  # unfinished ones of other searches, alive or dead
        self._settled: set[int] = set()
        self._news: list[Trial] = []
        self._silence = storage.Silence()
        self._columns = Columns()
        self._look()
        self._news.clear()
        self._abandoned = self._lost()
        if url:
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @property
    def name(self) -> str:
        return str(self._study.study_name)

    def reserve(self, suggestion: Suggestion, space: Space) -> Proposal | None:
        """Writes down that a strategy is being tried, in one write, and gives it its number.

        None where another search has just begun with the same strategy: of two the one with the lower number keeps it.
        """
        decision = {"why": suggestion.why, "expected_gain": suggestion.expected_gain, **suggestion.record}
        proposal = {
            "by": suggestion.by,
            "strategy": strategy_json(suggestion.strategy),
            "decision": decision,
            "owner": storage.signature() if self._url else None,
        }
        with self._reached():
            identity = self._store(space.parameters(suggestion.strategy), distributions(space), {_PROPOSAL: proposal})
            number = self._study._storage.get_trial_number_from_id(identity)
            self._ids[number] = identity
            if self._url and (first := self._faster(number, suggestion.strategy)) is not None:
                self._give_up(self._ids.pop(number), _WITHDRAWN, first)
                self._settled.add(number)
                self.proposals += 1
                self.spend(suggestion.record)
                return None
        self.begin(number, suggestion.strategy, suggestion.record)
        return Proposal(number, suggestion)

    def _store(self, parameters: Mapping[str, Any], wanted: Mapping[str, Any], attributes: Mapping[str, Any]) -> int:
        """Makes a running trial in the storage, and returns its identity there."""
        import optuna

        for last in (False, True):
            values, known = self._columns.of(parameters, wanted)
            template = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=values, distributions=known, user_attrs=dict(attributes)
            )
            try:
                identity: int = self._study._storage.create_new_trial(self._study._study_id, template)
            except ValueError:
                if last:
                    raise
                for frozen in self._study.get_trials(deepcopy=False):  # another search has just taken one of the names
                    self._columns.learn(frozen.distributions)
            else:
                self._columns.learn(known)
                return identity
        raise AssertionError

    def enter(self, space: Space) -> bool:
        """Notes which space is searched from now on; True where trials of another one came before.

        Only trials since then count for `since_gain`: nothing is known yet of what the space has gained.
        """
        with self._reached():
            held, now = self._study.user_attrs.get(_SPACE), space.described()
            changed = held is not None and held["space"] != now
            if held is None or changed:
                held = {"space": now, "from": 1 + max((t.number for t in self.trials), default=-1) if changed else 0}
                self._study.set_user_attr(_SPACE, held)
        self.since_gain = min(self.since_gain, sum(self.counts(t) for t in self.trials if t.number >= held["from"]))
        return changed

    def record(self, trial: Trial) -> bool:
        """Makes a trial finished; False where another search has taken it for lost, and its outcome comes too late."""
        from optuna.exceptions import UpdateFinishedTrialError

        identity = self._ids.pop(trial.number)
        self._settled.add(trial.number)
        try:
            with self._reached():
                self._study._storage.set_trial_user_attr(identity, _RECORD, trial_json(trial))
                self._tell(identity, trial)
        except UpdateFinishedTrialError:
            self._drop(trial.number)
            return False
        self.end(trial)
        return True

    def confirm(self, number: int, figures: Mapping[str, float]) -> None:
        """Keeps what a trial scored on items that the search did not use."""
        with self._reached():
            held = self._study.user_attrs.get(_CONFIRMED, {})  # other searches confirm, too
            self.confirmed |= {int(other): found for other, found in held.items()} | {number: dict(figures)}
            self._study.set_user_attr(_CONFIRMED, {str(n): kept for n, kept in self.confirmed.items()})

    @property
    def home(self) -> Mapping[str, Any] | None:
        """What the folder of its trials is known by (`winnow.search.outputs`); None before the first search has said so."""
        with self._reached():
            return self._study.user_attrs.get(_HOME)  # type: ignore[no-any-return]

    def move_in(self, home: Mapping[str, Any]) -> None:
        with self._reached():
            self._study.set_user_attr(_HOME, dict(home))

    def pay(self, energy: Mapping[str, float]) -> None:
        """Counts the energy of work that is in no finished trial."""
        if energy:
            self.use(energy)
            with self._reached():
                held = self._study.user_attrs.get(_ENERGY, {})
                self._study.set_user_attr(
                    _ENERGY, {name: held.get(name, 0.0) + energy.get(name, 0.0) for name in ("wh", "co2_g")}
                )

    def _tell(self, identity: int, trial: Trial) -> None:
        from optuna.trial import TrialState

        # a stopped trial has no values: in Optuna's terms it was pruned
        state = TrialState.COMPLETE if trial.complete else TrialState.PRUNED if trial.stopped else TrialState.FAIL
        values = [trial.figures[o.name] for o in self.objectives] if trial.complete else None
        self._study._storage.set_trial_state_values(identity, state, values)

    def refresh(self) -> list[Trial]:
        """Takes in what other searches have begun and finished; returns the trials finished since the last time."""
        if self._url:
            with self._reached():
                self._look()
        news, self._news = self._news, []
        return news

    def recover(self, finished: Callable[[int, Suggestion], Trial | None]) -> tuple[list[int], list[Suggestion]]:
        """Settles what dead searches left behind: the numbers of the trials that are lost, and what is to be tried again.

        Args:
            finished: given a number and what was suggested, the trial if its outcome had already reached the disk.
        """
        lost: list[int] = []
        again, self._abandoned = self._abandoned, {}
        dead = {number: frozen for number, frozen in self._others.items() if self._dead(frozen)}
        for number, frozen in dead.items():
            suggestion, attributes = _suggestion_from(frozen), frozen.user_attrs
            with self._reached():
                if _RECORD in attributes:
                    self._keep(frozen, trial_from_json(attributes[_RECORD]))
                elif (found := finished(number, suggestion)) is not None:
                    self._keep(frozen, found)
                elif self._give_up(frozen._trial_id, _LOST, True):
                    self._others.pop(number)
                    self._settled.add(number)
                    self._drop(number)
                    lost.append(number)
                    again[suggestion.strategy.overrides] = _repeated(frozen)
        if dead:
            self.trials.sort(key=lambda t: t.number)
        return lost, [suggestion for overrides, suggestion in again.items() if overrides not in self.seen]

    def _keep(self, frozen: optuna.trial.FrozenTrial, trial: Trial) -> None:
        """Makes a trial of a dead search finished."""
        self._others.pop(trial.number)
        self._ids[trial.number] = frozen._trial_id
        if self.record(trial):
            self._news.append(trial)
        else:
            self._settled.discard(trial.number)  # another search has settled it: the next look says how

    def _look(self) -> None:
        """Brings this history up to what the storage holds."""
        for frozen in self._study.get_trials(deepcopy=False):
            number, held = frozen.number, frozen.user_attrs
            if number in self._settled or number in self._ids:
                continue
            new = number not in self._others
            if new:
                self._columns.learn(frozen.distributions)
                self.proposals += 1
                self.spend(held.get(_PROPOSAL, {}).get("decision", {}))
            if frozen.state.is_finished() or _PROPOSAL not in held:
                self._others.pop(number, None)
                self._settled.add(number)
                if _RECORD in held:
                    trial = trial_from_json(held[_RECORD])
                    self.end(trial)
                    self._news.append(trial)
                elif not new:
                    self._drop(number)
            else:
                self._others[number] = frozen
                self.running[number] = strategy_from(held[_PROPOSAL]["strategy"])
                self.seen.add(self.running[number].overrides)

    def _lost(self) -> dict[tuple[str, ...], Suggestion]:
        """What was lost with an earlier search and has not been tried since."""
        held = self._study.get_trials(deepcopy=False)
        found = [_repeated(frozen) for frozen in held if frozen.user_attrs.get(_LOST)]
        return {s.strategy.overrides: s for s in found}

    def _faster(self, number: int, strategy: Strategy) -> int | None:
        """The trial of the same strategy that another search has begun since the last look, if it came first."""
        before = {*self.running, *self._settled}
        self._look()
        begun = {**self.running, **{t.number: t.strategy for t in self._news}}
        same = (n for n, s in begun.items() if n not in before and n < number and s.overrides == strategy.overrides)
        return min(same, default=None)

    def _dead(self, frozen: optuna.trial.FrozenTrial) -> bool:
        """Whether nobody works on it any more."""
        owner = frozen.user_attrs[_PROPOSAL]["owner"]
        if not self._url or owner is None or storage.gone(owner):
            return True
        return self._silence.since_long(frozen.number, frozen.user_attrs.get(_BEAT))

    def _give_up(self, identity: int, key: str, value: Any) -> bool:
        """Ends a trial that has no outcome; of several searches that try, one succeeds."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self._study._storage.set_trial_user_attr(identity, key, value)
            return bool(self._study._storage.set_trial_state_values(identity, TrialState.FAIL, None))
        except UpdateFinishedTrialError:
            return False

    def _drop(self, number: int) -> None:
        """A trial that came to nothing: its strategy may be proposed again, unless another trial has it, too."""
        strategy = self.running.pop(number)
        taken = (*self.running.values(), *(trial.strategy for trial in self.trials))
        if all(strategy.overrides != other.overrides for other in taken):
            self.seen.discard(strategy.overrides)

    def _beat(self) -> None:
        """Shows the other searches that this one lives; in a thread of its own, since a proposal may take minutes."""
        beat = 0
        while True:
            time.sleep(storage.BEAT_S)
            beat += 1
            for identity in list(self._ids.values()):
                with contextlib.suppress(Exception):  # finished meanwhile, or not reached: the search itself will see
                    self._study._storage.set_trial_user_attr(identity, _BEAT, beat)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        with storage.reaching(self._url) if self._url else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """Lets go of the storage; what SQLite wrote ahead goes into its one file."""
        self._study._storage.remove_session()
        backend = getattr(self._study._storage, "_backend", self._study._storage)
        backend.engine.dispose()

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


def recorded(study: optuna.Study) -> list[tuple[int, Suggestion]]:
    """What was proposed in a study, in order: the number of each trial, and why it was made."""
    found: dict[tuple[str, ...], tuple[int, Suggestion]] = {}
    for frozen in study.get_trials(deepcopy=False):
        if _PROPOSAL in frozen.user_attrs:
            suggestion = _suggestion_from(frozen)
            found.setdefault(suggestion.strategy.overrides, (frozen.number, suggestion))
    return list(found.values())


def _suggestion_from(frozen: optuna.trial.FrozenTrial) -> Suggestion:
    held = frozen.user_attrs[_PROPOSAL]
    decision = held["decision"]
    gain = decision.get("expected_gain")
    return Suggestion(strategy_from(held["strategy"]), held["by"], expected_gain=gain, record=decision)


def _repeated(frozen: optuna.trial.FrozenTrial) -> Suggestion:
    suggestion = _suggestion_from(frozen)
    return replace(suggestion, record={**suggestion.record, "again": frozen.number})
