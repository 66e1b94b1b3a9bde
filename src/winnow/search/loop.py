"""The search: asks the policy, has the strategy run, records what came of it, until the budget is spent.

Nothing here knows Hydra: the sweeper passes in `launch`, which runs one trial.
"""

from __future__ import annotations

import contextlib
import functools
import math
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
from winnow.search.overrides import command_lines
from winnow.search.trial import read_outcome
from winnow.search.views import Views
from winnow.search.workers import Launch, Workers
from winnow.study.budget import Budget, Convergence
from winnow.study.history import should_retry
from winnow.study.policy import Exhausted, Forecaster, Policy, Suggestion, fresh
from winnow.study.space import Space
from winnow.study.study import Proposal, Study

KEEP = ("front", "all", "none")
MOST_REFUSED = 20  # proposals in a row, before the space is searched for one that is possible
DRAWS = 500  # of a large space, for that
WAIT_S = 2.0  # between looks at what another search is doing


@dataclass
class Search:
    """One search over one study.

    Attributes:
        outlook: what is known of a strategy before it runs; told of every trial.
        launch: runs one trial and returns its outcome.
        shared: the overrides of every trial, for the command lines that make a trial again.
        folder: of the study; trials lie in `trials/<number>/`.
        first: of these the `first_trials` smallest are tried before the policy is asked; the base model is always the very first.
        keep: which trials' weights stay on disk: of the front, all, or none.
        workers: trials that run at a time.
        confirm: scores the front again once the search has ended.
        convergence: says when nothing more is gained.
    """

    study: Study
    space: Space
    policy: Policy
    outlook: Forecaster
    launch: Launch
    budget: Budget
    folder: Path
    shared: Sequence[str]
    views: Views
    log: Callable[[str], None]
    first: Sequence[Strategy] = ()
    first_trials: int = 2
    keep: str = "front"
    workers: int = 1
    confirm: Callable[[], None] | None = None
    convergence: Convergence = field(default_factory=Convergence)
    _again: list[Suggestion] = field(default_factory=list, init=False)
    _refused: int = field(default=0, init=False)  # proposals in a row

    def __post_init__(self) -> None:
        self._trials = Folders(self.folder / "trials")

    def run(self) -> None:
        """Runs trials until the budget or the space is spent; on Ctrl-C the study and its views are left in order.

        Raises:
            UserError: the base model itself cannot be evaluated, or the disk is full.
        """
        self.budget.start()
        workers = Workers(self.launch, self.workers)
        try:
            self._resume()
            self._work(workers)
            if self.confirm is not None:
                self.confirm()
        except BaseException as error:
            left = workers.stop(self._trials.cancel)
            with contextlib.suppress(OSError):  # on a full disk, say, the first error is the one to show
                self.views.write(self.study.summary(), final=True, mirror=False)  # quick: somebody may be waiting
            if left:
                self.log(
                    f"search: {left} trials do not answer; wherever they run, they end when they see that it is over"
                )
            if isinstance(error, KeyboardInterrupt):
                self.log(f"search: interrupted; the same command goes on with study {self.study.name}")
            raise
        self.views.write(self.study.summary(), final=True)
        self._forget_weights(self.keep)

    def _work(self, workers: Workers) -> None:
        ended = ""
        while True:
            while not ended and workers.free:
                self._look()
                if self.study.base is None and self.study.running:
                    break  # all others are judged by the base model's figures
                ended = self.budget.spent(self.study) or self.convergence.reached(self.study)
                if ended:
                    break
                try:
                    proposal = self._next()
                except Exhausted as end:
                    ended = str(end)
                    break
                if proposal is not None:
                    self._announce(proposal)
                    workers.start(proposal)
            if not workers.idle:
                if self._finish(*workers.wait()):
                    ended = ""  # its budget was not used up
            elif ended:
                break
            else:
                time.sleep(WAIT_S)  # for the base model's trial, in another search
        self.log(f"search: {ended}")

    def _resume(self) -> None:
        before = len(self.study.trials)
        lost = self._take_over()
        self.study.refresh()
        again = {trial.decision.get("retried") for trial in self.study.trials}
        for trial in self.study.trials:
            self.outlook.observe(trial)
            if self.study.runs_again(trial) and trial.number not in again:
                self._retry(trial)
        changed = self.study.enter(self.space)
        left_out = self._leave_out()
        if self.study.base is None and not self.study.running:
            self.study.seen.discard(
                Strategy().overrides
            )  # it failed, and whoever starts again has done something about it
        if before or lost:
            more = f"; {lost - left_out} that were cut off will run again" if lost > left_out else ""
            self.log(
                f"search: going on with study {self.study.name}: {len(self.study.trials)} trials are finished{more}"
            )
        if (changed and self.study.trials) or left_out:
            outside = sum(not self.space.holds(trial.strategy) for trial in self.study.trials)
            more = f", and {left_out} that were cut off do not run again" if left_out else ""
            self.log(
                f"search: the space is another one now: {outside} of the finished trials lie outside it and keep their place "
                f"on the front{more}"
            )

    def _look(self) -> None:
        """What other searches have done meanwhile, and what those that have died left behind."""
        news = self.study.refresh()
        lost = self._take_over()
        lost -= self._leave_out()
        if lost:
            self.log(f"search: another search has ended; {lost} of its trials will run again")
        for trial in [*news, *self.study.refresh()]:
            self.outlook.observe(trial)
            self.views.trial(trial, self.study)
            _check_base(trial)

    def _take_over(self) -> int:
        lost, again = self.study.recover(self._finished)
        self._again.extend(again)
        for number in lost:
            self.study.pay(self._trials.spent(number))
            self._trials.clear(number, kept=MESSAGES)  # the trial that repeats it names it
            self._trials.cancel(number)  # a node may still work on it, or get to it later
        return len(lost)

    def _leave_out(self) -> int:
        """Takes out of what is to run again all that is not in the space any more; how many those are."""
        kept = [suggestion for suggestion in self._again if not self.space.objection(suggestion.strategy)]
        dropped, self._again = len(self._again) - len(kept), kept
        return dropped

    def _next(self) -> Proposal | None:
        """What to try now; None where it was refused, which costs nothing and is written down, or another search was faster."""
        suggestion = self._suggestion()
        proposal = self.study.reserve(suggestion, self.space)
        if proposal is None:
            return None
        refusal = self.space.objection(suggestion.strategy)
        if suggestion.strategy.methods and not refusal:
            refusal = self.outlook.infeasible_reason(suggestion.strategy)
        self._trials.clear(proposal.number)  # of an earlier study of this name
        self._trials.keep_messages(proposal.number, suggestion.messages)
        if refusal:
            outcome = {
                "figures": {},
                "sources": {},
                "reason": Reason.INFEASIBLE.value,
                "message": refusal,
                "seconds": {},
            }
            self._record(self._made(proposal, outcome))
            self._refused += 1
            return None
        self._refused = 0
        return proposal

    def _suggestion(self) -> Suggestion:
        self._again = [s for s in self._again if s.strategy.overrides not in self.study.seen]
        again = next((s for s in self._again if not s.strategy.methods), None)
        if Strategy().overrides not in self.study.seen and again is None:
            return Suggestion(Strategy(), "base")
        if self._again:
            self._again.remove(again := again or self._again[0])
            return again
        for strategy in self._first:
            if strategy.overrides not in self.study.seen:
                return Suggestion(strategy, "first")
        if self._refused >= MOST_REFUSED:
            return self._possible()
        return self.policy.ask(self.study, self.space, self.outlook)

    def _possible(self) -> Suggestion:
        """A strategy that is not refused, where the policy has proposed many that are.

        Raises:
            Exhausted: none of the whole space, or of many draws from a large one, is; the message says what forbids them.
        """
        rng = np.random.default_rng([self.study.proposals])
        strategies = fresh(self.study, self.space, rng, DRAWS)
        refusals = [self.outlook.infeasible_reason(strategy) for strategy in strategies]
        for strategy, refusal in zip(strategies, refusals, strict=True):
            if not refusal:
                return Suggestion(
                    strategy, "search", "drawn at random: the agent's proposals were refused one after the other"
                )
        causes = Counter(refusal.partition("over ")[2] or refusal for refusal in refusals)
        told = "; ".join(f"{count:,} by {cause}" for cause, count in causes.most_common(3))
        raise Exhausted(f"nothing that can be proposed is allowed: of {len(refusals):,} strategies are refused {told}")

    @functools.cached_property
    def _first(self) -> list[Strategy]:
        return smallest(self.first, self.outlook, self.first_trials)

    def _announce(self, proposal: Proposal) -> None:
        of = f" of {self.budget.trials}" if self.budget.trials else ""
        self.log(f"trial {proposal.number} ({self.study.run_trials + 1}{of}): {proposal.strategy}")
        self._trials.prepare(proposal.number, self.study, self.study.fingerprint.get("model", {}).get("sha256"))

    def _finish(self, proposal: Proposal, outcome: dict[str, Any], seconds: float) -> bool:
        """Records a trial; returns whether it is to be tried once more."""
        trial = self._made(proposal, outcome, seconds)
        self._record(trial)
        again = self.study.runs_again(trial)
        if again:
            why = f"failed ({trial.reason}): {trial.message}" if trial.reason else self._disturbed(trial)
            self.log(f"trial {trial.number} {why}; it is tried once more")
            self._retry(trial)
        if trial.reason is Reason.DISK_FULL:
            raise UserError(
                f"outputs={self.folder.parent}: the disk is full ({trial.message}); free some space and go on"
            )
        _check_base(trial)
        return again

    def _disturbed(self, trial: Trial) -> str:
        names = ", ".join(self.study.disturbed(trial))
        return f"is the base model, with which all others are compared, and its {names} was measured beside other work"

    def _retry(self, trial: Trial) -> None:
        self.study.seen.discard(trial.strategy.overrides)
        record = {**trial.decision, "retried": trial.number}
        self._again.append(Suggestion(trial.strategy, trial.proposed_by, record=record))

    def _record(self, trial: Trial) -> None:
        front = self.study.front
        if not self.study.record(trial):
            self.log(f"trial {trial.number} came too late: another search has taken it for lost, and runs it again")
            return
        self.outlook.observe(trial)
        self.views.trial(trial, self.study)
        if self.study.front != front or not trial.complete:
            self._forget_weights("front" if self.confirm is not None and self.keep == "none" else self.keep)

    def _made(self, proposal: Proposal, outcome: dict[str, Any], seconds: float | None = None) -> Trial:
        """The record of an outcome; one without a finite value for every objective is a failure."""
        reason = Reason(outcome["reason"]) if outcome["reason"] else None
        message, figures = outcome["message"], outcome["figures"]
        if reason is None:
            bad = [o.name for o in self.study.objectives if not math.isfinite(figures.get(o.name, math.nan))]
            if bad:
                reason, message = Reason.NOT_FINITE, f"{', '.join(bad)} is not a finite number"
        suggestion = proposal.suggestion
        decision = {"why": suggestion.why, "expected_gain": suggestion.expected_gain, **suggestion.record}
        return Trial(
            number=proposal.number,
            strategy=proposal.strategy,
            figures=figures,
            sources=outcome["sources"],
            reason=reason,
            message=message,
            estimates=outcome.get("estimates", {}),
            seconds={**outcome["seconds"], **({} if seconds is None else {"total": round(seconds, 3)})},
            energy=outcome.get("energy", {}),
            stages=outcome.get("stages", []),
            commands=command_lines(self.shared, proposal.strategy, self._trials.of(proposal.number)),
            proposed_by=suggestion.by,
            decision=decision,
        )

    def _finished(self, number: int, suggestion: Suggestion) -> Trial | None:
        """The trial of a killed search whose outcome had reached the disk."""
        outcome = read_outcome(self._trials.of(number))
        if outcome is None or not set(suggestion.strategy.overrides) <= set(outcome.get("overrides") or ()):
            return None
        return self._made(Proposal(number, suggestion), outcome)

    def _forget_weights(self, keep: str) -> None:
        """Removes the weights of trials that `keep` does not name; manifest and figures stay."""
        if keep == "all":
            return
        kept = set(self.study.front) if keep == "front" else set()
        if self.confirm is not None and self.study.base is not None:
            kept.add(self.study.base.number)  # compared with, once more, at the end
        # others may be at work here, too
        self._trials.drop_weights({trial.number for trial in self.study.trials} - kept)


def _check_base(trial: Trial) -> None:
    if not trial.strategy.methods and not trial.complete and not should_retry(trial):
        raise UserError(f"the base model cannot be evaluated ({trial.reason}): {trial.message}")
