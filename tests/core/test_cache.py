"""Entries of a cache: shared by processes, whole or missing, within a limit, and never those of another key."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from winnow.core.cache import BatchCache, Cache


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def store(cache: Cache, key: Any, value: Any) -> Path:
    entry = cache.entry(key)
    with cache.writing(entry) as scratch:
        scratch.write_text(json.dumps(value))
    return entry


def load_folder(path: Path) -> dict[str, str]:
    if not (path / "last").is_file():
        raise ValueError(f"{path} is incomplete")
    return {file.name: file.read_text() for file in path.iterdir()}


def store_folder(cache: Cache, entry: Path, text: str) -> None:
    with cache.writing(entry) as scratch:
        scratch.mkdir()
        for name in ("first", "last"):
            (scratch / name).write_text(text)


def test_an_entry_is_that_of_its_key_and_of_no_other(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "values", suffix=".json")
    store(cache, {"bits": 4, "path": tmp_path}, 1)
    assert cache.read(cache.entry({"path": tmp_path, "bits": 4}), load) == 1
    for other in ({"bits": 3, "path": tmp_path}, {"bits": "4", "path": tmp_path}, {"bits": 4}, ["bits", 4], None):
        assert cache.read(cache.entry(other), load) is None
    assert cache.entry("a", name="scores").name.startswith("scores-")
    assert Cache(tmp_path / "others").read(cache.entry({"bits": 4}), load) is None


def test_a_later_file_replaces_and_a_failed_one_leaves_the_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path, suffix=".json")
    entry = store(cache, "key", 1)
    store(cache, "key", 2)
    with pytest.raises(OSError, match="full"), cache.writing(entry) as scratch:
        scratch.write_text("[1, 2")
        raise OSError("the disk is full")
    assert cache.read(entry, load) == 2
    assert list(tmp_path.iterdir()) == [entry]


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.entry("key")
    store_folder(cache, entry, "faster")
    with pytest.raises(OSError):
        store_folder(cache, entry, "slower")
    assert cache.read(entry, load_folder) == {"first": "faster", "last": "faster"}
    assert list(tmp_path.iterdir()) == [entry]


@pytest.mark.parametrize("damage", ["", '{"a"'])
def test_a_damaged_file_is_missing(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path, suffix=".json")
    entry = store(cache, "key", 1)
    entry.write_text(damage)
    assert cache.read(entry, load) is None
    store(cache, "key", 2)
    assert cache.read(entry, load) == 2


def test_a_damaged_folder_is_removed_so_that_it_can_be_stored_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.entry("key")
    store_folder(cache, entry, "old")
    (entry / "last").unlink()
    assert cache.read(entry, load_folder) is None
    store_folder(cache, entry, "new")
    assert cache.read(entry, load_folder) == {"first": "new", "last": "new"}


def test_only_the_named_exceptions_are_damage(tmp_path: Path) -> None:
    class Unreadable(Exception):
        pass

    def refuse(path: Path) -> None:
        raise Unreadable

    cache = Cache(tmp_path)
    entry = store(cache, "key", 1)
    with pytest.raises(Unreadable):
        cache.read(entry, refuse)
    assert entry.exists()
    assert Cache(tmp_path, damage=(Unreadable,)).read(entry, refuse) is None
    assert not entry.exists()


def age(entry: Path, seconds: float) -> None:
    os.utime(entry, (seconds, seconds))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=300)
    a, b = store(cache, "a", "x" * 98), store(cache, "b", "x" * 98)
    age(a, 1)
    age(b, 2)
    assert cache.read(a, load)
    assert cache.read(b, lambda path: None) is None  # looked at, but of no use
    c, d = store(cache, "c", "x" * 98), store(cache, "d", "x" * 98)
    assert sorted(path for path in (a, b, c, d) if path.exists()) == sorted((a, c, d))
    assert store(cache, "e", "x" * 300).exists() is False
    assert all(path.exists() for path in (a, c, d))


def test_room_is_made_before_the_work_and_none_that_is_read_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=1000)
    a, b, c = (cache.entry(key) for key in "abc")
    for seconds, entry in enumerate((a, b), 1):
        store_folder(cache, entry, "x" * 200)
        age(entry, seconds)
    with cache.reading(a, load_folder) as value:
        assert value is not None
        age(a, 1)
        with cache.writing(c, expected_bytes=400) as scratch:
            assert a.exists() and not b.exists()
            scratch.mkdir()
            (scratch / "last").write_text("x" * 900)
        assert a.exists() and c.exists()  # nothing could be removed
    store_folder(cache, b, "x")
    assert not a.exists() and b.exists()


def test_what_a_killed_process_was_writing_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=10**6)
    entry = cache.entry("key")
    with (
        contextlib.suppress(KeyboardInterrupt),
        cache.computing(entry),
        cache.writing(entry, resumable=True) as scratch,
    ):
        scratch.mkdir()
        (scratch / "first").write_text("done")
        raise KeyboardInterrupt
    assert cache.read(entry, load_folder) is None
    with cache.computing(entry), cache.writing(entry, resumable=True) as scratch:
        assert (scratch / "first").read_text() == "done"
        (scratch / "last").write_text("done")
    assert cache.read(entry, load_folder) == {"first": "done", "last": "done"}


def test_a_folder_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, limit_bytes=1000)
    entry = store(cache, "key", 1)

    def refuse(*arguments: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.read(entry, load) == 1
    (tmp_path / "a file").write_text("")
    assert Cache(tmp_path / "a file").read(tmp_path / "a file" / "entry", load) is None


def compute_once(folder: Path, start: Any) -> None:
    cache = Cache(folder, suffix=".json")
    entry = cache.entry("key")
    start.wait(30)
    with cache.computing(entry):
        if cache.read(entry, load) is None:
            with cache.writing(entry) as scratch:
                scratch.write_text(str(os.getpid()))
            with (folder / "computed").open("a") as file:
                file.write("x")


def test_two_processes_compute_an_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=compute_once, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "computed").read_text() == "x"
    assert Cache(tmp_path, suffix=".json").read(Cache(tmp_path, suffix=".json").entry("key"), load) in [
        process.pid for process in processes
    ]


def test_what_is_missing_is_computed_in_one_call() -> None:
    calls: list[list[int]] = []

    def squares(items: list[int]) -> list[int]:
        calls.append(items)
        return [item**2 for item in items]

    cache: BatchCache[int, int, int] = BatchCache(lambda item: item, limit=4)
    assert cache.values([1, 2, 1], squares) == [1, 4, 1]
    assert cache.values([2, 3], squares) == [4, 9]
    assert calls == [[1, 2], [3]]
    assert cache.values([3, 4, 1], squares) == [9, 16, 1]  # over the limit: computed anew
    assert calls[2:] == [[3, 4, 1]]
    assert cache.values([], squares) == []
