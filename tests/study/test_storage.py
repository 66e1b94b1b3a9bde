"""Who may write to a study: one search to a file, several to a database server, and what the dead leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search import kills, small_search
from winnow.core.errors import UserError
from winnow.core.types import Strategy, Trial
from winnow.study import storage
from winnow.study.opening import open_study
from winnow.study.policy import Suggestion
from winnow.study.space import read_space
from winnow.study.study import Study

SPACE = read_space(small_search.METHODS, {})
RTN = Strategy(("rtn",), {"method.rtn.bits": 4, "method.rtn.group_size": 64})
BIN = Path("/usr/lib/postgresql/15/bin")


def opened(folder: Path, url: str = "") -> Study:
    """A study that believes that others write to it, too."""
    study = open_study("s", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}})
    return Study(study._study, small_search.OBJECTIVES, {"model": {"name": "m"}}, url=small_search.address(folder))


def done(number: int, strategy: Strategy = RTN) -> Trial:
    return Trial(number, strategy, {"accuracy": 0.5, "size_bytes": 1.0}, {})


def nothing(number: int, suggestion: Suggestion) -> None:
    """No outcome has reached the disk."""


def test_a_second_search_on_the_same_file_is_refused(tmp_path: Path) -> None:
    url = small_search.address(tmp_path)
    first = kills.FORK.Process(target=_claim_and_wait, args=(url, tmp_path / "claimed"))
    first.start()
    wait_for((tmp_path / "claimed").exists)
    with pytest.raises(UserError, match=rf"study=mine .*pid {first.pid}.*study=NAME"):
        storage.claim(url, "mine")
    first.kill()
    first.join()
    storage.claim(url, "mine")  # the dead hold nothing


def _claim_and_wait(url: str, said: Path) -> None:
    storage.claim(url, "mine")
    said.touch()
    signal.pause()


def test_a_journal_that_a_kill_left_behind_is_no_damage(tmp_path: Path) -> None:
    opened(tmp_path)
    writer = kills.FORK.Process(target=_killed_while_writing, args=(tmp_path / "study.db",))
    writer.start()
    writer.join()
    assert (tmp_path / "study.db-wal").stat().st_size > 0
    assert opened(tmp_path).trials == []


def _killed_while_writing(path: Path) -> None:
    import sqlite3

    connection = sqlite3.connect(path)
    connection.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the end of the transaction
    connection.execute("CREATE TABLE many (text)")
    connection.executemany("INSERT INTO many VALUES (?)", [("x" * 1000,)] * 1000)
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_search_sees_what_the_others_do(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path)
    base = ours.reserve(Suggestion(Strategy(), "base"), SPACE)
    assert base is not None
    assert theirs.refresh() == []
    assert theirs.running == {base.number: Strategy()}
    ours.record(done(base.number, Strategy()))
    assert [trial.number for trial in theirs.refresh()] == [base.number]
    assert theirs.refresh() == []
    assert theirs.base is not None
    assert theirs.running == {}


def test_of_two_searches_with_one_idea_the_first_keeps_it(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path)
    first = ours.reserve(Suggestion(RTN, "tpe"), SPACE)
    assert first is not None
    assert theirs.reserve(Suggestion(RTN, "tpe"), SPACE) is None
    assert theirs.running == {first.number: RTN}
    ours.record(done(first.number))
    again = opened(tmp_path)
    assert [trial.number for trial in again.trials] == [first.number]
    assert again.recover(nothing) == ([], [])


def test_the_trials_of_a_living_search_are_left_to_it_and_those_of_a_dead_one_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = opened(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(storage, "_machine", lambda: "another machine")
        proposal = theirs.reserve(Suggestion(RTN, "tpe", why="small"), SPACE)
    assert proposal is not None
    ours, now = opened(tmp_path), [0.0]
    ours._heartbeats = storage.HeartbeatMonitor(lambda: now[0])

    def taken() -> list[int]:
        ours.refresh()
        return ours.recover(nothing)[0]

    assert taken() == []
    now[0] += 10 * storage.GRACE_S
    theirs._study._storage.set_trial_user_attr(theirs._ids[proposal.number], "beat", 1)
    assert taken() == []
    now[0] += 0.5 * storage.GRACE_S
    assert taken() == []
    now[0] += 0.6 * storage.GRACE_S
    assert taken() == [proposal.number]
    assert RTN.overrides not in ours.proposed

    assert not theirs.record(done(proposal.number)), "it came back from the dead, and its outcome too late"
    third = opened(tmp_path)
    assert third.trials == []
    (again,) = third.recover(nothing)[1]
    assert (again.strategy, again.by, again.record["why"]) == (RTN, "tpe", "small")


def test_of_a_dead_process_on_this_machine_the_trials_are_taken_at_once(tmp_path: Path) -> None:
    writer = kills.FORK.Process(target=_reserve, args=(tmp_path,))
    opened(tmp_path)
    writer.start()
    writer.join()
    lost, (again,) = opened(tmp_path).recover(nothing)
    assert lost == [0]
    assert again.strategy == RTN


def _reserve(folder: Path) -> None:
    opened(folder).reserve(Suggestion(RTN, "tpe"), SPACE)


def test_an_outcome_that_reached_the_disk_is_not_lost(tmp_path: Path) -> None:
    opened(tmp_path)
    writer = kills.FORK.Process(target=_reserve, args=(tmp_path,))
    writer.start()
    writer.join()
    ours = opened(tmp_path)
    assert ours.recover(lambda number, suggestion: done(number, suggestion.strategy)) == ([], [])
    assert [trial.number for trial in ours.refresh()] == [0]
    assert opened(tmp_path).front == (0,)


def test_a_password_is_not_shown() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://me:secret@127.0.0.1:{closed.getsockname()[1]}/studies"
        pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'winnow[postgres]'")
        with pytest.raises(UserError, match=r"storage=.*me:.*cannot be used.*refused") as error:
            open_study("s", url, small_search.OBJECTIVES, {})
    assert "secret" not in str(error.value)


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(UserError, match="storage=studies is not the URL"):
        storage.sqlite_file("studies")


# PostgreSQL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Makes databases on a server of the test's own, and gives their URLs."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'winnow[postgres]'")
    if not (BIN / "initdb").exists():
        pytest.skip("PostgreSQL 15 is not installed: apt-get install postgresql")
    folder = (
        Path("/tmp") / f"winnow-postgres-{os.getpid()}"
    )  # another user must get there, and the socket's path be short
    folder.mkdir()
    user = "postgres" if os.getuid() == 0 else None  # it refuses to be root
    if user:
        shutil.chown(folder, user)

    def run(*line: Any) -> None:
        subprocess.run(list(map(str, line)), check=True, capture_output=True, cwd="/", user=user)

    data = folder / "data"
    fast = "-c fsync=off -c shared_buffers=16MB"
    run(BIN / "initdb", "-D", data, "-A", "trust", "-U", "winnow", "--no-sync")
    control = [BIN / "pg_ctl", "-D", data, "-w"]
    options = f"-k {folder} -c listen_addresses= {fast}"
    run(*control, "-l", folder / "log.txt", "-o", options, "start")

    def database(name: str) -> str:
        run(BIN / "createdb", "-h", folder, "-U", "winnow", name)
        return f"postgresql+psycopg://winnow@/{name}?host={folder}"

    try:
        yield database
    finally:
        run(*control, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def started(folder: Path) -> list[str]:
    return kills.lines(folder / "started.jsonl")


def test_two_searches_share_a_study_on_postgresql(server: Callable[[str], str], tmp_path: Path) -> None:
    url = server("two")
    folders = [tmp_path / "a", tmp_path / "b"]
    pairs = zip(folders, folders[::-1], strict=True)
    searches = [kills.start(one, url=url, workers=2, seconds=0.1, beside=other) for one, other in pairs]
    for search, folder in zip(searches, folders, strict=True):
        search.join()
        assert search.exitcode == 0, (folder / "search.txt").read_text()
    runs = Counter(line for folder in folders for line in started(folder))
    assert len(runs) == small_search.TRIALS
    assert max(runs.values()) == 1, "a strategy was tried twice"
    study = open_study("small", url, small_search.OBJECTIVES, {"model": {"name": "m"}})
    assert len({trial.number for trial in study.trials}) == len(study.trials) == small_search.TRIALS
    for folder in folders:
        own = {int(path.name) for path in (folder / "trials").iterdir()}
        said = (folder / "search.txt").read_text()
        others = [t.number for t in study.trials if t.number not in own and f"\ntrial {t.number}  " in said]
        assert own and others, "it has not heard of the other search's trials"


def test_what_a_killed_search_left_on_postgresql_the_next_one_takes_over(
    server: Callable[[str], str], tmp_path: Path
) -> None:
    url = server("killed")
    first = kills.start(tmp_path / "a", url=url, workers=2, seconds=600)
    wait_for(lambda: len(started(tmp_path / "a")) == 3)  # the base model, and two that will not end
    os.killpg(first.pid or 0, signal.SIGKILL)
    first.join()
    second = kills.start(tmp_path / "b", url=url, seconds=0.01)
    second.join()
    assert second.exitcode == 0, (tmp_path / "b" / "search.txt").read_text()
    assert "2 that were cut off will run again" in (tmp_path / "b" / "search.txt").read_text()
    assert set(started(tmp_path / "a")[1:]) < set(started(tmp_path / "b"))
    study = open_study("small", url, small_search.OBJECTIVES, {"model": {"name": "m"}})
    recorded = Counter(trial.strategy.overrides for trial in study.trials)
    assert len(recorded) == small_search.TRIALS
    assert max(recorded.values()) == 1
