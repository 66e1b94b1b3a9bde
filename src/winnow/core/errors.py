"""Defines the errors that users see and the reasons why a trial fails or is stopped."""

from __future__ import annotations

import contextlib
import enum
import errno
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can correct: it is shown as one line with exit code 2, and nothing is written."""


class MissingExtra(UserError):
    """An optional library is not installed; the message names the extra that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'winnow[{extra}]'")


class Unservable(UserError):
    """An artifact does not load in its runtime, or does not work once it is loaded."""


def check_seed(seed: int, key: str = "seed") -> None:
    """Raises UserError for a seed, configured under `key`, that the random generator of some library rejects."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{key}={seed} is out of range; give a whole number from 0 to {2**32 - 1:,}")


class Reason(enum.StrEnum):
    """Why a trial failed or was stopped."""

    INVALID = "invalid"  # the settings were rejected
    INFEASIBLE = "infeasible"  # the configuration shows that it does not fit the hardware, or breaks a constraint
    MISSING = "missing_dependency"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the process died
    ERROR = "error"  # an exception
    UNSERVABLE = "unservable"  # the artifact does not load, or does not work
    NOT_FINITE = "not_finite"  # an objective is NaN or infinite
    DISK_FULL = "disk_full"
    LOST = "lost"  # the search itself was killed while the trial ran
    HOPELESS = "hopeless"  # stopped: its score is far from the base model's, and a trial that is no worse elsewhere is close to it
    DOMINATED = "dominated"  # stopped: another trial is better with confidence, by the items scored so far


STOPPED = (Reason.HOPELESS, Reason.DOMINATED)


class Stopped(Exception):
    """An evaluation was stopped early, because the rest of it would not put the candidate on the front.

    Attributes:
        estimates: the results so far: each score's estimate, `<name>_low` and `<name>_high`, and `share_scored`.
    """

    def __init__(self, reason: Reason, message: str, estimates: Mapping[str, float]) -> None:
        super().__init__(message)
        self.reason, self.message, self.estimates = reason, message, dict(estimates)

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason.value, "message": self.message, "estimates": self.estimates}


class RankLost(RuntimeError):
    """A training process died, or does not answer the other ranks."""


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error of Python, safetensors or SQLite says that no space is left."""
    number = getattr(error, "errno", None)
    phrases = ("No space left on device", "database or disk is full")  # safetensors; SQLite
    return number in (errno.ENOSPC, errno.EDQUOT) or any(phrase in str(error) for phrase in phrases)


def classify(error: BaseException) -> Reason:
    """Returns the reason that an exception stands for."""
    cause = error.__cause__
    if is_disk_full(error) or (cause is not None and is_disk_full(cause)):
        return Reason.DISK_FULL
    if isinstance(error, MissingExtra | ModuleNotFoundError):
        return Reason.MISSING
    if isinstance(error, Unservable):
        return Reason.UNSERVABLE
    if isinstance(error, UserError):
        return Reason.INVALID
    text = f"{type(error).__name__}: {error}"
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if no_memory or "OutOfMemory" in text or "can't allocate memory" in text or "out of memory" in text:
        return Reason.OUT_OF_MEMORY
    return Reason.ERROR


def describe(error: BaseException) -> str:
    """Returns the first line of an error's message, after the error's type unless it is a UserError."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, its cause, the cause of that, and so on: libraries wrap each other's errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raised_below(error: BaseException, folder: Path) -> bool:
    """Returns whether the code that raised an error lies in `folder`."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).is_relative_to(folder)


@contextlib.contextmanager
def as_unservable(what: str) -> Iterator[None]:
    """Turns errors into an Unservable error about `what`, unless the model is not the cause.

    A wrong setting, a missing library, and too little memory or disk space say nothing about the model.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or classify(error) is not Reason.ERROR:
            raise
        raise Unservable(f"{what} fails: {describe(error)}") from error
