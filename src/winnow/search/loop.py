"""The search loop: asks the policy for a strategy, runs it as a trial and records the outcome, until the budget is spent.

The loop does not depend on Hydra: the sweeper passes in `launch`, which runs one trial.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from winnow.core.errors import Reason, UserError
from winnow.core.types import Strategy, Trial
from winnow.search.folders import MESSAGES, Folders
from winnow.search.forecaster import smallest
from winnow.search.outcome import failure, read_outcome, trial_from_outcome
from winnow.search.overrides import command_lines
from winnow.search.views import Views
from winnow.search.workers import Launch, Workers
from winnow.study.budget import Budget, Convergence
from winnow.study.history import should_retry
from winnow.study.policy import Exhausted, Forecaster, Policy, Suggestion, untried_strategies
from winnow.study.space import Space
from winnow.study.study import Proposal, Study

logger = logging.getLogger(__name__)

KEEP = ("front", "all", "none")
MAX_REFUSED = 20  # refused proposals in a row after which the loop itself draws a feasible strategy
DRAWS = 500  # strategies drawn from a large space for that
WAIT_S = 2.0  # between checks for the results of another search


@dataclass
class Search:
    """One search over one study.

    Attributes:
        forecaster: forecasts strategies before they run, and observes every trial.
        launch: runs one trial and returns its outcome.
        shared: the overrides of every trial, for the command lines that reproduce a trial.
        folder: the folder of the study; trials lie in `trials/<number>/`.
        first: the `first_trials` smallest of these run before the policy is asked; the base model always runs first of all.
        keep: the trials whose weights stay on disk: those of the front, all, or none.
        workers: number of trials that run at the same time.
        confirm: scores the front again after the last trial.
        convergence: ends the search when further trials gain nothing.
    """

    study: Study
    space: Space
    policy: Policy
    forecaster: Forecaster
    launch: Launch
    budget: Budget
    folder: Path
    shared: Sequence[str]
    views: Views
    first: Sequence[Strategy] = ()
    first_trials: int = 2
    keep: str = "front"
    workers: int = 1
    confirm: Callable[[], None] | None = None
    convergence: Convergence = field(default_factory=Convergence)
    _retries: list[Suggestion] = field(default_factory=list, init=False)
    _refused_in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._folders = Folders(self.folder / "trials")

    def run(self) -> None:
        """Runs trials until the budget or the space is exhausted; on Ctrl-C the study and its views stay consistent.

        Raises:
            UserError: the base model itself cannot be evaluated, or the disk is full.
        """
        self.budget.start()
        workers = Workers(self.launch, self.workers)
        try:
            self._resume()
            self._run_trials(workers)
            if self.confirm is not None:
                self.confirm()
        except BaseException as error:
            running = workers.stop(self._folders.cancel)
            with contextlib.suppress(OSError):  # e.g. on a full disk: the first error is the one to show
                self.views.write(self.study.summary(), final=True, mirror=False)  # without W&B: the user may be waiting
            if running:
                logger.info(
                    f"search: {running} trials do not answer; wherever they run, they end when they see that it is over"
                )
            if isinstance(error, KeyboardInterrupt):
                logger.info(f"search: interrupted; the same command goes on with study {self.study.name}")
            raise
        self.views.write(self.study.summary(), final=True)
        self._remove_weights(self.keep)

    def _run_trials(self, workers: Workers) -> None:
        end_reason = ""
        while True:
            while not end_reason and workers.free:
                self._read_other_searches()
                if self.study.base is None and self.study.running:
                    break  # all other trials are compared with the base model's figures
                end_reason = self.budget.spent(self.study) or self.convergence.reached(self.study)
                if end_reason:
                    break
                try:
                    proposal = self._next_proposal()
                except Exhausted as end:
                    end_reason = str(end)
                    break
                if proposal is not None:
                    self._announce(proposal)
                    workers.start(proposal)
            if not workers.idle:
                if self._finish(*workers.wait()):
                    end_reason = ""  # the repeated trial still belongs to the budget
            elif end_reason:
                break
            else:
                time.sleep(WAIT_S)  # another search runs the base model's trial
        logger.info(f"search: {end_reason}")

    def _resume(self) -> None:
        trials_before = len(self.study.trials)
        lost_count = self._recover_lost_trials()
        self.study.refresh()
        retried = {trial.decision.get("retried") for trial in self.study.trials}
        for trial in self.study.trials:
            self.forecaster.observe(trial)
            if self.study.runs_again(trial) and trial.number not in retried:
                self._retry(trial)
        changed = self.study.enter_space(self.space)
        left_out = self._drop_outside_space()
        if self.study.base is None and not self.study.running:
            self.study.proposed.discard(Strategy().overrides)  # it failed, and a restart may have fixed the cause
        if trials_before or lost_count:
            note = f"; {lost_count - left_out} that were cut off will run again" if lost_count > left_out else ""
            logger.info(
                f"search: going on with study {self.study.name}: {len(self.study.trials)} trials are finished{note}"
            )
        if (changed and self.study.trials) or left_out:
            outside = sum(not self.space.contains(trial.strategy) for trial in self.study.trials)
            note = f", and {left_out} that were cut off do not run again" if left_out else ""
            logger.info(
                f"search: the space is another one now: {outside} of the finished trials lie outside it and keep their place "
                f"on the front{note}"
            )

    def _read_other_searches(self) -> None:
        """Reads the trials that other searches finished, and takes over those of searches that died."""
        new_trials = self.study.refresh()
        lost_count = self._recover_lost_trials()
        lost_count -= self._drop_outside_space()
        if lost_count:
            logger.info(f"search: another search has ended; {lost_count} of its trials will run again")
        for trial in [*new_trials, *self.study.refresh()]:
            self.forecaster.observe(trial)
            self.views.trial(trial, self.study)
            _check_base(trial)

    def _recover_lost_trials(self) -> int:
        lost_numbers, suggestions = self.study.recover(self._read_finished)
        self._retries.extend(suggestions)
        for number in lost_numbers:
            self.study.record_energy(self._folders.spent(number))
            self._folders.clear(number, keep=MESSAGES)  # the repeated trial refers to them
            self._folders.cancel(number)  # a node may still run it or start it later
        return len(lost_numbers)

    def _drop_outside_space(self) -> int:
        """Drops the trials to repeat that are outside the present space; returns their number."""
        inside = [suggestion for suggestion in self._retries if not self.space.invalid_reason(suggestion.strategy)]
        dropped, self._retries = len(self._retries) - len(inside), inside
        return dropped

    def _next_proposal(self) -> Proposal | None:
        """Returns the next proposal; None if it was refused (recorded, at no cost) or if another search was faster."""
        suggestion = self._next_suggestion()
        proposal = self.study.reserve(suggestion, self.space)
        if proposal is None:
            return None
        refusal = self.space.invalid_reason(suggestion.strategy)
        if suggestion.strategy.methods and not refusal:
            refusal = self.forecaster.infeasible_reason(suggestion.strategy)
        self._folders.clear(proposal.number)  # files of an earlier study of the same name
        self._folders.keep_messages(proposal.number, suggestion.messages)
        if refusal:
            self._record(self._to_trial(proposal, failure(Reason.INFEASIBLE, refusal)))
            self._refused_in_a_row += 1
            return None
        self._refused_in_a_row = 0
        return proposal

    def _next_suggestion(self) -> Suggestion:
        self._retries = [s for s in self._retries if s.strategy.overrides not in self.study.proposed]
        retry = next((s for s in self._retries if not s.strategy.methods), None)
        if Strategy().overrides not in self.study.proposed and retry is None:
            return Suggestion(Strategy(), "base")
        if self._retries:
            self._retries.remove(retry := retry or self._retries[0])
            return retry
        for strategy in self._first_strategies:
            if strategy.overrides not in self.study.proposed:
                return Suggestion(strategy, "first")
        if self._refused_in_a_row >= MAX_REFUSED:
            return self._draw_feasible()
        return self.policy.ask(self.study, self.space, self.forecaster)

    def _draw_feasible(self) -> Suggestion:
        """Draws a feasible strategy at random, after many refused proposals of the policy.

        Raises:
            Exhausted: no strategy of the space, or of many draws from a large one, is feasible; the message names the causes.
        """
        rng = np.random.default_rng([self.study.proposals])
        strategies = untried_strategies(self.study, self.space, rng, DRAWS)
        refusals = [self.forecaster.infeasible_reason(strategy) for strategy in strategies]
        for strategy, refusal in zip(strategies, refusals, strict=True):
            if not refusal:
                return Suggestion(
                    strategy, "search", "drawn at random: the agent's proposals were refused one after the other"
                )
        causes = Counter(refusal.partition("over ")[2] or refusal for refusal in refusals)
        counts = "; ".join(f"{count:,} by {cause}" for cause, count in causes.most_common(3))
        raise Exhausted(
            f"nothing that can be proposed is allowed: of {len(refusals):,} strategies are refused {counts}"
        )

    @functools.cached_property
    def _first_strategies(self) -> list[Strategy]:
        return smallest(self.first, self.forecaster, self.first_trials)

    def _announce(self, proposal: Proposal) -> None:
        of_total = f" of {self.budget.trials}" if self.budget.trials else ""
        logger.info(f"trial {proposal.number} ({self.study.run_trials + 1}{of_total}): {proposal.strategy}")
        self._folders.prepare(proposal.number, self.study, self.study.fingerprint.get("model", {}).get("sha256"))

    def _finish(self, proposal: Proposal, outcome: dict[str, Any], seconds: float) -> bool:
        """Records a finished trial; returns whether it will run once more."""
        trial = self._to_trial(proposal, outcome, seconds)
        self._record(trial)
        retry = self.study.runs_again(trial)
        if retry:
            why = f"failed ({trial.reason}): {trial.message}" if trial.reason else self._describe_disturbance(trial)
            logger.info(f"trial {trial.number} {why}; it is tried once more")
            self._retry(trial)
        if trial.reason is Reason.DISK_FULL:
            raise UserError(
                f"outputs={self.folder.parent}: the disk is full ({trial.message}); free some space and go on"
            )
        _check_base(trial)
        return retry

    def _describe_disturbance(self, trial: Trial) -> str:
        names = ", ".join(self.study.disturbed(trial))
        return f"is the base model, with which all others are compared, and its {names} was measured beside other work"

    def _retry(self, trial: Trial) -> None:
        self.study.proposed.discard(trial.strategy.overrides)
        record = {**trial.decision, "retried": trial.number}
        self._retries.append(Suggestion(trial.strategy, trial.proposed_by, record=record))

    def _record(self, trial: Trial) -> None:
        front = self.study.front
        if not self.study.record(trial):
            logger.info(f"trial {trial.number} came too late: another search has taken it for lost, and runs it again")
            return
        self.forecaster.observe(trial)
        self.views.trial(trial, self.study)
        if self.study.front != front or not trial.complete:
            self._remove_weights("front" if self.confirm is not None and self.keep == "none" else self.keep)

    def _to_trial(self, proposal: Proposal, outcome: dict[str, Any], seconds: float | None = None) -> Trial:
        commands = command_lines(self.shared, proposal.strategy, self._folders.of(proposal.number))
        return trial_from_outcome(proposal, outcome, self.study.objectives, commands, seconds)

    def _read_finished(self, number: int, suggestion: Suggestion) -> Trial | None:
        """Returns the trial of a killed search if its outcome is on the disk."""
        outcome = read_outcome(self._folders.of(number))
        if outcome is None or not set(suggestion.strategy.overrides) <= set(outcome.get("overrides") or ()):
            return None
        return self._to_trial(Proposal(number, suggestion), outcome)

    def _remove_weights(self, keep: str) -> None:
        """Removes the weights of all trials outside `keep`; manifests and figures stay."""
        if keep == "all":
            return
        numbers = set(self.study.front) if keep == "front" else set()
        if self.confirm is not None and self.study.base is not None:
            numbers.add(self.study.base.number)  # the confirmation compares the front with it
        # only finished trials: other searches may use this folder, too
        self._folders.drop_weights({trial.number for trial in self.study.trials} - numbers)


def _check_base(trial: Trial) -> None:
    if not trial.strategy.methods and not trial.complete and not should_retry(trial):
        raise UserError(f"the base model cannot be evaluated ({trial.reason}): {trial.message}")
