"""The search: asks the policy, has the strategy run, records what came of it, until the budget is spent.

Nothing here knows Hydra: the sweeper passes in `launch`, which runs one trial.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.agent.policy import Exhausted, Outlook, Policy, Suggestion
from winnow.search.budget import Budget, Convergence
from winnow.search.overrides import command_lines
from winnow.search.space import Space
from winnow.search.study import Proposal, Study
from winnow.search.trial import RIVALS, read_outcome
from winnow.search.views import Views
from winnow.search.workers import Launch, Workers
from winnow.types import Reason, Strategy, Trial, UserError

KEEP = ("front", "all", "none")
MESSAGES = "messages.json"  # in a trial's folder: what was said with a language model to come to its strategy
TRANSIENT = (Reason.CRASHED, Reason.LOST)  # a trial that failed so is tried once more


@dataclass
class Search:
    """One search over one study.

    Attributes:
        outlook: what is known of a strategy before it runs; told of every trial.
        launch: runs one trial and returns its outcome.
        shared: the overrides of every trial, for the command lines that make a trial again.
        folder: of the study; trials lie in `trials/<number>/`.
        first: strategies to try before the policy is asked; the base model is always the very first.
        keep: which trials' weights stay on disk: of the front, all, or none.
        workers: trials that run at a time.
        convergence: says when nothing more is gained.
    """

    study: Study
    space: Space
    policy: Policy
    outlook: Outlook
    launch: Launch
    budget: Budget
    folder: Path
    shared: Sequence[str]
    views: Views
    log: Callable[[str], None]
    first: Sequence[Strategy] = ()
    keep: str = "front"
    workers: int = 1
    convergence: Convergence = field(default_factory=Convergence)
    _again: deque[Suggestion] = field(default_factory=deque, init=False)

    def run(self) -> None:
        """Runs trials until the budget or the space is spent; on Ctrl-C the study and its views are left in order.

        Raises:
            UserError: the base model itself cannot be evaluated, or the disk is full.
        """
        self.budget.start()
        self._resume()
        try:
            with Workers(self.launch, self.workers) as workers:
                self._work(workers)
        except BaseException as error:
            with contextlib.suppress(OSError):  # on a full disk, say, the first error is the one to show
                self.views.write(self.study.summary(), final=True, mirror=False)  # quick: somebody may be waiting
            if isinstance(error, KeyboardInterrupt):
                self.log(f"search: interrupted; the same command goes on with study {self.study.name}")
            raise
        self.views.write(self.study.summary(), final=True)

    def _work(self, workers: Workers) -> None:
        ended = ""
        while True:
            while not ended and workers.free and (workers.idle or self.study.base is not None):
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
            if workers.idle:
                break
            self._finish(*workers.wait())
        if ended:
            self.log(f"search: {ended}")

    def _resume(self) -> None:
        before = len(self.study.trials)
        lost, again = self.study.recover(self._finished)
        self._again.extend(again)
        for number in lost:
            self._clear(number, kept=MESSAGES)  # the trial that repeats it names it
        for trial in self.study.trials:
            self.outlook.observe(trial)
        if before or lost:
            more = f"; {len(lost)} that were cut off will run again" if lost else ""
            self.log(
                f"search: going on with study {self.study.name}: {len(self.study.trials)} trials are finished{more}"
            )

    def _next(self) -> Proposal | None:
        """What to try now; None where it was refused, which costs nothing and is written down."""
        suggestion = self._suggestion()
        proposal = self.study.reserve(suggestion, self.space)
        refusal = self.outlook.refusal(suggestion.strategy) if suggestion.strategy.methods else ""
        self._clear(proposal.number)  # of an earlier study of this name
        self._keep_messages(proposal)
        if refusal:
            outcome = {
                "figures": {},
                "sources": {},
                "reason": Reason.INFEASIBLE.value,
                "message": refusal,
                "seconds": {},
            }
            self._record(self._made(proposal, outcome))
            return None
        return proposal

    def _suggestion(self) -> Suggestion:
        for strategy, by in [(Strategy(), "base"), *((s, "first") for s in self.first)]:
            if strategy.overrides not in self.study.seen:
                return Suggestion(strategy, by)
        while self._again:
            suggestion = self._again.popleft()
            if suggestion.strategy.overrides not in self.study.seen:
                return suggestion
        return self.policy.ask(self.study, self.space, self.outlook)

    def _announce(self, proposal: Proposal) -> None:
        of = f" of {self.budget.trials}" if self.budget.trials else ""
        self.log(f"trial {proposal.number} ({len(self.study.trials) + 1}{of}): {proposal.strategy}")
        folder = self._folder(proposal.number)
        folder.mkdir(parents=True, exist_ok=True)
        rivals = [{"number": t.number, "figures": dict(t.figures)} for t in self.study.on_front]
        (folder / RIVALS).write_text(json.dumps(rivals) + "\n", encoding="utf-8")

    def _finish(self, proposal: Proposal, outcome: dict[str, Any], seconds: float) -> None:
        trial = self._made(proposal, outcome, seconds)
        if trial.reason in TRANSIENT and not trial.decision.get("retried"):
            self.log(f"trial {trial.number} failed ({trial.reason}): {trial.message}; it is tried once more")
            record = {**proposal.suggestion.record, "retried": trial.number}
            self._record(trial)
            self.study.seen.discard(trial.strategy.overrides)
            self._again.append(
                Suggestion(proposal.strategy, proposal.suggestion.by, proposal.suggestion.why, record=record)
            )
        else:
            self._record(trial)
        if trial.reason is Reason.DISK_FULL:
            raise UserError(
                f"outputs={self.folder.parent}: the disk is full ({trial.message}); free some space and go on"
            )
        if not trial.strategy.methods and not trial.complete:
            raise UserError(f"the base model cannot be evaluated ({trial.reason}): {trial.message}")

    def _record(self, trial: Trial) -> None:
        front = self.study.front
        self.study.record(trial)
        self.outlook.observe(trial)
        self.views.trial(trial, self.study)
        if self.study.front != front or not trial.complete:
            self._forget_weights()

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
            commands=command_lines(self.shared, proposal.strategy, str(self._folder(proposal.number) / "artifact")),
            proposed_by=suggestion.by,
            decision=decision,
        )

    def _finished(self, number: int, suggestion: Suggestion) -> Trial | None:
        """The trial of a killed search whose outcome had reached the disk."""
        outcome = read_outcome(self._folder(number))
        if outcome is None or not set(suggestion.strategy.overrides) <= set(outcome.get("overrides") or ()):
            return None
        return self._made(Proposal(number, suggestion), outcome)

    def _keep_messages(self, proposal: Proposal) -> None:
        if proposal.suggestion.messages:
            folder = self._folder(proposal.number)
            folder.mkdir(parents=True)
            scratch = folder / f".{MESSAGES}.partial"
            scratch.write_text(json.dumps(proposal.suggestion.messages, indent=1) + "\n", encoding="utf-8")
            scratch.replace(folder / MESSAGES)

    def _clear(self, number: int, kept: str = "") -> None:
        """Removes what lies in a trial's folder, and the folder if nothing is kept."""
        folder = self._folder(number)
        if not (folder / kept).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != kept:
                path.unlink(missing_ok=True)

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def _forget_weights(self) -> None:
        """Removes the weights of trials that `keep` does not name; manifest and figures stay."""
        if self.keep == "all":
            return
        kept = set(self.study.front) if self.keep == "front" else set()
        for artifact in (self.folder / "trials").glob("*/artifact"):
            number = int(artifact.parent.name)
            if number not in kept and number not in self.study.running:
                shutil.rmtree(artifact, ignore_errors=True)
