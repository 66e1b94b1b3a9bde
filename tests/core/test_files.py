"""Files are there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from winnow.core.files import atomic_write, write_json


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
