"""Decides when a search ends: what it may spend, and how many trials it may run without a gain."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from winnow.core.errors import UserError
from winnow.study.history import History


@dataclass
class Budget:
    """The limits of a search; None means no limit.

    Attributes:
        trials: trials of the whole study that were run.
        hours: duration of this start of the search.
        kwh, co2_kg: energy and emissions of the whole study's trials.
        usd, tokens: cost of the language model that steers, in the whole study.
    """

    trials: int | None = 20
    hours: float | None = None
    kwh: float | None = None
    co2_kg: float | None = None
    usd: float | None = None
    tokens: int | None = None
    _started: float = field(default_factory=time.monotonic, init=False, repr=False)

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in ("trials", "hours", "kwh", "co2_kg")):
            raise UserError(
                "budget.trials, hours, kwh and co2_kg are all null: such a search would never end; set one of them"
            )
        for name in ("trials", "hours", "kwh", "co2_kg", "usd", "tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"budget.{name}={value} leaves nothing to do; give more than 0")

    def start(self) -> None:
        self._started = time.monotonic()

    def spent(self, history: History) -> str:
        """Returns the limit that was reached, in words; "" if none was."""
        if self.trials is not None and history.run_trials + len(history.running) >= self.trials:
            return f"budget.trials={self.trials} is spent"
        if self.hours is not None and time.monotonic() - self._started > 3600 * self.hours:
            return f"budget.hours={self.hours:g} is spent"
        if self.kwh is not None and history.energy_wh >= 1000 * self.kwh:
            return f"budget.kwh={self.kwh:g} is spent"
        if self.co2_kg is not None and history.co2_g >= 1000 * self.co2_kg:
            return f"budget.co2_kg={self.co2_kg:g} is spent"
        return ""

    def llm_budget_spent(self, history: History) -> str:
        """Returns the limit of the language model that was reached, in words; the search then goes on without the model."""
        if self.tokens is not None and history.tokens >= self.tokens:
            return f"budget.tokens={self.tokens} is spent"
        if self.usd is not None and history.usd >= self.usd:
            return f"budget.usd={self.usd:g} is spent"
        return ""

    def remaining(self, history: History) -> dict[str, float]:
        """Returns what is left of each limit that is set."""
        used = {
            "trials": history.run_trials + len(history.running),
            "hours": (time.monotonic() - self._started) / 3600,
            "kwh": history.energy_wh / 1000,
            "co2_kg": history.co2_g / 1000,
            "usd": history.usd,
            "tokens": history.tokens,
        }
        limits = {name: getattr(self, name) for name in used}
        return {name: max(0.0, limit - used[name]) for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Convergence:
    """Ends a search that gains nothing.

    Attributes:
        trials: this many trials in a row without a new one on the front end the search; None never ends it.
    """

    trials: int | None = None

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise UserError(f"convergence={self.trials} ends the search before it begins; give 1 or more, or null")

    def reached(self, history: History) -> str:
        """Returns why the search has converged, in words; "" if it has not."""
        if self.trials is not None and history.since_gain >= self.trials:
            return f"converged: {history.since_gain} trials in a row have gained nothing (convergence={self.trials})"
        return ""
