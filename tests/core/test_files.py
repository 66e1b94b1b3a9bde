"""Files are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from winnow.core.files import atomic_write, put_in_place, write_first, write_json


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="full"), atomic_write(path) as scratch:
        scratch.write_text('{"a": 2, "b"')
        raise OSError("the disk is full")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    with atomic_write(path) as scratch:
        scratch.write_text("half")
        assert not path.exists() and scratch.suffix == ".json"
    assert path.read_text() == "half"


def test_what_json_has_no_word_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "front.json", {"path": tmp_path})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "manifest.json", {"path": tmp_path}, default=str)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"path": str(tmp_path)}


@pytest.mark.parametrize("links", [True, False])
def test_the_first_to_write_wins(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.json"

    def without_links(*arguments: Any) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", without_links)
    write_first(path, "first")
    assert path.read_text() == "first"
    if links:
        write_first(path, "second")
        assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", ["folder", "file", None])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path, before: str | None) -> None:
    scratch, path, aside = (tmp_path / name for name in ("scratch", "place", "aside"))
    for folder in (scratch, aside, *([path] if before == "folder" else [])):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    if before == "file":
        path.write_text("a file")
    put_in_place(scratch, path, aside)
    assert list(tmp_path.iterdir()) == [path] and (path / "name").read_text() == "scratch"
