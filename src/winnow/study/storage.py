"""Where a study is kept, and who may write to it: one search on an SQLite file, any number on a database server.

A file belongs to the search that holds its lock, which the kernel takes back from the dead. On a server each search signs its
trials, and beats for them while they run: what stays silent for `GRACE_S`, or whose process is gone from this machine, is taken
over by the others. Beats are counters that the others watch with their own clocks, so clocks need not agree.
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
_ATTEMPTS = 5  # to open one that another search is just making


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for a database server."""
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
    """The URL of an SQLite file, whatever its path is made of."""
    from sqlalchemy.engine import URL

    url: str = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
    return url


def claim(url: str, study: str) -> None:
    """Takes the lock of an SQLite file, until this process ends, however it ends; a database server needs none.

    Raises:
        UserError: another search holds it.
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
    """Opens or creates a study in Optuna's storage, whatever it holds."""
    import optuna
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    with reaching(url):
        for attempt in range(_ATTEMPTS):
            try:
                return optuna.create_study(
                    study_name=name, storage=_open(url), directions=directions, load_if_exists=True
                )
            # two searches that make the tables at once stumble over one another
            except (ProgrammingError, IntegrityError):
                if sqlite_file(url) is not None or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
    raise AssertionError


def existing(name: str, url: str) -> optuna.Study:
    """A study to read from.

    Raises:
        UserError: the storage holds none of that name, is damaged, or cannot be reached.
    """
    import optuna

    with reaching(url):
        try:
            return optuna.load_study(study_name=name, storage=_open(url))
        except KeyError:
            raise UserError(f"{url} holds no study of the name {name}") from None


def _open(url: str) -> optuna.storages.RDBStorage:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (path := sqlite_file(url)) is None:
        # a connection that the server has closed meanwhile is made anew
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    check_sqlite(path)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"factory": _Ahead}})


class _Ahead(sqlite3.Connection):
    """Writes to a log first (https://sqlite.org/wal.html): no wait for the disk at each commit.

    A kill loses nothing; where the power fails the last trials may be lost here, and are found again in their folders.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """What a storage that fails becomes: an error for the user, without the password."""
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
    """Raises UserError if a study's file is there and is not a whole SQLite database."""
    if not path.exists():
        return
    try:
        # writable: a kill in the middle of a transaction leaves a journal, which is rolled back when the file is next opened
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


def signature() -> dict[str, Any]:
    """Of this process: enough to tell, on the same machine, whether it still lives."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process that signed ran on this machine and has ended; of other machines nothing is known."""
    return bool(owner["machine"] == _machine()) and _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since the boot (proc(5), `stat`, field 22), which no clock can move."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None


@functools.cache
def _machine() -> str:
    """This boot of this kernel, and the process ids that are seen from here: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


class Silence:
    """Tells who has not beaten for `GRACE_S`, by this process's own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[int, tuple[Any, float]] = {}  # by trial: its last beat, and when that was new

    def since_long(self, number: int, beat: Any) -> bool:
        last, when = self._heard.setdefault(number, (beat, self._clock()))
        if beat != last:
            self._heard[number] = (beat, self._clock())
            return False
        return self._clock() - when > GRACE_S
