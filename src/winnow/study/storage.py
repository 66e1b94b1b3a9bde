"""Opens the storage of a study and controls who may write to it: one search on an SQLite file, several on a database server.

A file belongs to the search that holds its lock, which the kernel releases when the process dies. On a server each search signs
its trials, and sends heartbeats for them while they run. Other searches take over a trial without a heartbeat for `GRACE_S`, or
whose process has ended on this machine. Heartbeats are counters that the others time with their own clocks, so clocks need not
agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.libraries import require

if TYPE_CHECKING:
    import optuna

BEAT_S = 15.0
GRACE_S = 180.0  # longer than a database server takes to start again
_ATTEMPTS = 5  # attempts to open a storage that another search is just creating


def sqlite_file(url: str) -> Path | None:
    """Returns the file of an SQLite URL; None for a database server."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UserError(
            f"storage={url} is not the URL of a database; write storage=postgresql://USER@HOST/DATABASE, or leave it out"
        ) from None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def sqlite_url(file: Path) -> str:
    """Returns the URL of an SQLite file; the path may hold any characters."""
    from sqlalchemy.engine import URL

    url: str = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
    return url


def claim(url: str, study: str) -> None:
    """Locks an SQLite file until this process ends, also by a kill; a database server needs no lock.

    Raises:
        UserError: another search holds the lock.
    """
    path = sqlite_file(url)
    if path is None:
        return
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"study={study} is being searched by another process (pid {holder}); wait for its end, give this search a name "
            f"of its own with study=NAME, or let both write to a database server with storage=postgresql://..."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def connect(name: str, url: str, directions: list[str]) -> optuna.Study:
    """Opens or creates a study in Optuna's storage, without a check of its settings."""
    import optuna
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    with as_user_errors(url):
        for attempt in range(_ATTEMPTS):
            try:
                return optuna.create_study(
                    study_name=name, storage=_open(url), directions=directions, load_if_exists=True
                )
            # two searches that create the tables at the same time get one of these errors
            except (ProgrammingError, IntegrityError):
                if sqlite_file(url) is not None or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
    raise AssertionError


def load_study(name: str, url: str) -> optuna.Study:
    """Opens an existing study, to read from it.

    Raises:
        UserError: the storage holds no study of that name, is damaged, or cannot be reached.
    """
    import optuna

    with as_user_errors(url):
        try:
            return optuna.load_study(study_name=name, storage=_open(url))
        except KeyError:
            raise UserError(f"{url} holds no study of the name {name}") from None


def _open(url: str) -> optuna.storages.RDBStorage:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (path := sqlite_file(url)) is None:
        # replace a connection that the server has closed in the meantime
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    check_sqlite(path)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"factory": _WriteAheadConnection}})


class _WriteAheadConnection(sqlite3.Connection):
    """An SQLite connection with a write-ahead log (https://sqlite.org/wal.html), which does not wait for the disk at each commit.

    A kill loses nothing. A power failure may lose the last trials here; the next start reads them from their folders.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def as_user_errors(url: str) -> Iterator[None]:
    """Turns errors of a storage into UserErrors, without the password of the URL."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        if url.startswith("postgresql"):
            require("psycopg")
        raise UserError(f"storage: no driver for {url.partition(':')[0]} is installed ({error.__cause__})") from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        shown = make_url(url).render_as_string(hide_password=True)
        raise UserError(
            f"storage={shown} cannot be used: {str(cause).splitlines()[0]}; nothing finished is lost, and the same command goes on"
        ) from error


def check_sqlite(path: Path) -> None:
    """Raises UserError if a study's file exists and is not an intact SQLite database."""
    if not path.exists():
        return
    try:
        # opened for writing: a kill in a transaction leaves a journal, which is rolled back when the file is next opened
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True) as connection:
            verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
        connection.close()
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise UserError(
            f"{path} is damaged ({verdict}); move it away to start afresh, or restore a copy. The trials' folders beside it "
            f"keep their figures"
        )


def process_signature() -> dict[str, Any]:
    """Returns what identifies this process, so that others on the same machine can see whether it is alive."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def has_ended(owner: Mapping[str, Any]) -> bool:
    """Returns True if the process with this signature ran on this machine and has ended; False for other machines."""
    return bool(owner["machine"] == _machine()) and _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str | None:
    """Returns the start of a process in ticks since the boot (proc(5), `stat`, field 22), which no change of a clock affects."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None


@functools.cache
def _machine() -> str:
    """Returns an id of this boot of the kernel and of this namespace of process ids: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


class HeartbeatMonitor:
    """Detects trials without a heartbeat for `GRACE_S`, by this process's own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_beats: dict[int, tuple[Any, float]] = {}  # trial number -> its last heartbeat, and when that was new

    def is_overdue(self, number: int, beat: Any) -> bool:
        """Returns True if the heartbeat of a trial has not changed for `GRACE_S`."""
        last, when = self._last_beats.setdefault(number, (beat, self._clock()))
        if beat != last:
            self._last_beats[number] = (beat, self._clock())
            return False
        return self._clock() - when > GRACE_S
