"""The errors that people see, and the reasons for which a trial fails or is stopped."""

from __future__ import annotations

import contextlib
import enum
import errno
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, exit code 2, nothing written."""


class MissingExtra(UserError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'winnow[{extra}]'")


class Unservable(UserError):
    """An artifact that its runtime cannot load, or that does not work when it is loaded."""


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that the random generators of some library do not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; give a whole number from 0 to {2**32 - 1:,}")


class Reason(enum.StrEnum):
    """Why a trial failed."""

    INVALID = "invalid"  # the settings were refused
    INFEASIBLE = "infeasible"  # known from the configuration: it does not fit the hardware, or breaks a constraint
    MISSING = "missing_dependency"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the process died
    ERROR = "error"  # an exception
    UNSERVABLE = "unservable"  # the artifact does not load, or does not work
    NOT_FINITE = "not_finite"  # an objective is NaN or infinite
    DISK_FULL = "disk_full"
    LOST = "lost"  # the search itself was killed while the trial ran
    HOPELESS = "hopeless"  # stopped: far off the base model, where one that is no worse elsewhere is near it
    DOMINATED = "dominated"  # stopped: by the items scored so far another is better, with confidence


STOPPED = (Reason.HOPELESS, Reason.DOMINATED)


class Stopped(Exception):
    """An evaluation was ended before its end, because more of it would not put the candidate on the front.

    Attributes:
        estimates: what was found by then: of each score its estimate, `<name>_low` and `<name>_high`, and `share_scored`.
    """

    def __init__(self, reason: Reason, message: str, estimates: Mapping[str, float]) -> None:
        super().__init__(message)
        self.reason, self.message, self.estimates = reason, message, dict(estimates)

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason.value, "message": self.message, "estimates": self.estimates}


class RankLost(RuntimeError):
    """A process of a training died, or one that the others need does not answer."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of the safetensors library, says that no space is left."""
    number = getattr(error, "errno", None)
    words = ("No space left on device", "database or disk is full")  # safetensors; SQLite
    return number in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words)


def classify(error: BaseException) -> Reason:
    """The typed reason of an exception."""
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
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on: libraries wrap the errors of others."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raised_below(error: BaseException, folder: Path) -> bool:
    """Whether the code that raised an error lies in a folder."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).is_relative_to(folder)


@contextlib.contextmanager
def as_unservable(what: str) -> Iterator[None]:
    """Turns errors into one that says that `what` cannot be served, unless something else is to blame.

    A setting, a library that is missing, memory or disk that does not suffice say nothing about the model.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or classify(error) is not Reason.ERROR:
            raise
        raise Unservable(f"{what} fails: {describe(error)}") from error
