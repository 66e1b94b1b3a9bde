"""The search: asks the policy, has the strategy run, records what came of it, until the budget is spent.

Nothing here knows Hydra: the sweeper passes in `launch`, which runs one trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.search.overrides import command_lines
from winnow.search.space import Space
from winnow.search.study import Exhausted, Proposal, Study
from winnow.search.trial import read_outcome
from winnow.search.views import Views
from winnow.types import Policy, Reason, Strategy, Trial, UserError

Launch = Callable[[int, Strategy], dict[str, Any]]  # number, strategy -> outcome
KEEP = ("front", "all", "none")


@dataclass(frozen=True)
class Budget:
    """What a search may spend; None is without limit. `hours` counts this start only, `trials` the whole study."""

    trials: int | None = 20
    hours: float | None = None

    def __post_init__(self) -> None:
        if self.trials is None and self.hours is None:
            raise UserError("budget.trials and budget.hours are both null: such a search would never end; set one")
        for name in ("trials", "hours"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"budget.{name}={value} leaves nothing to do; give more than 0")


@dataclass
class Search:
    """One search over one study.

    Attributes:
        shared: the overrides of every trial, for the command lines that make a trial again.
        folder: of the study; trials lie in `trials/<number>/`.
        first: strategies to try before the policy is asked; the base model is always the very first.
        keep: which trials' weights stay on disk: of the front, all, or none.
    """

    study: Study
    space: Space
    policy: Policy
    launch: Launch
    budget: Budget
    folder: Path
    shared: Sequence[str]
    views: Views
    log: Callable[[str], None]
    first: Sequence[Strategy] = ()
    keep: str = "front"

    def run(self) -> None:
        """Runs trials until the budget or the space is spent; on Ctrl-C the study and its views are left in order.

        Raises:
            UserError: the base model itself cannot be evaluated, or the disk is full.
        """
        started = time.monotonic()
        self._resume()
        try:
            while not self._spent(started):
                try:
                    proposal = self._next()
                except Exhausted as end:
                    self.log(f"search: {end}")
                    break
                self._trial(proposal)
        except BaseException as error:
            with contextlib.suppress(OSError):  # on a full disk, say, the first error is the one to show
                self.views.write(self.study.summary(), final=True, mirror=False)  # quick: somebody may be waiting
            if isinstance(error, KeyboardInterrupt):
                self.log(f"search: interrupted; the same command goes on with study {self.study.name}")
            raise
        self.views.write(self.study.summary(), final=True)

    def _resume(self) -> None:
        before = len(self.study.trials)
        lost = self.study.recover(self._finished)
        for number in lost:
            shutil.rmtree(self._folder(number), ignore_errors=True)
        if before or lost:
            again = f"; {len(lost)} that were cut off will run again" if lost else ""
            self.log(
                f"search: going on with study {self.study.name}: {len(self.study.trials)} trials are finished{again}"
            )

    def _spent(self, started: float) -> bool:
        if self.budget.trials is not None and len(self.study.trials) >= self.budget.trials:
            return True
        return self.budget.hours is not None and time.monotonic() - started > 3600 * self.budget.hours

    def _next(self) -> Proposal:
        for strategy, by in [(Strategy(), "base"), *((s, "first") for s in self.first)]:
            if strategy.overrides not in self.study.seen:
                return self.study.propose_strategy(self.space, strategy, by)
        proposal: Proposal = self.policy.ask(self.study, self.space)
        return proposal

    def _trial(self, proposal: Proposal) -> None:
        of = f" of {self.budget.trials}" if self.budget.trials else ""
        self.log(f"trial {proposal.number} ({len(self.study.trials) + 1}{of}): {proposal.strategy}")
        shutil.rmtree(self._folder(proposal.number), ignore_errors=True)  # of an earlier study of this name
        begun = time.perf_counter()
        outcome = self.launch(proposal.number, proposal.strategy)
        trial = self._made(proposal.number, proposal.strategy, outcome, proposal.proposed_by)
        seconds = {**trial.seconds, "total": round(time.perf_counter() - begun, 3)}
        self.study.record(dataclasses.replace(trial, seconds=seconds))
        summary = self.study.summary()
        self.views.trial(self.study.trials[-1], summary)
        self._forget_weights(summary.front)
        if trial.reason is Reason.DISK_FULL:
            raise UserError(
                f"outputs={self.folder.parent}: the disk is full ({trial.message}); free some space and go on"
            )
        if not trial.strategy.methods and not trial.complete:
            raise UserError(f"the base model cannot be evaluated ({trial.reason}): {trial.message}")

    def _made(self, number: int, strategy: Strategy, outcome: dict[str, Any], by: str) -> Trial:
        """The record of an outcome; one without a finite value for every objective is a failure."""
        reason = Reason(outcome["reason"]) if outcome["reason"] else None
        message, figures = outcome["message"], outcome["figures"]
        if reason is None:
            bad = [o.name for o in self.study.objectives if not math.isfinite(figures.get(o.name, math.nan))]
            if bad:
                reason, message = Reason.NOT_FINITE, f"{', '.join(bad)} is not a finite number"
        return Trial(
            number=number,
            strategy=strategy,
            figures=figures,
            sources=outcome["sources"],
            reason=reason,
            message=message,
            seconds=outcome["seconds"],
            commands=command_lines(self.shared, strategy, str(self._folder(number) / "artifact")),
            proposed_by=by,
        )

    def _finished(self, number: int, strategy: Strategy) -> Trial | None:
        """The trial of a killed search whose outcome had reached the disk."""
        outcome = read_outcome(self._folder(number))
        if outcome is None or not set(strategy.overrides) <= set(outcome.get("overrides") or ()):
            return None
        return self._made(number, strategy, outcome, "recovered")

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def _forget_weights(self, front: Sequence[int]) -> None:
        """Removes the weights of trials that `keep` does not name; manifest and figures stay."""
        if self.keep == "all":
            return
        for trial in self.study.trials:
            artifact = self._folder(trial.number) / "artifact"
            if artifact.is_dir() and not (self.keep == "front" and trial.number in front):
                shutil.rmtree(artifact, ignore_errors=True)
