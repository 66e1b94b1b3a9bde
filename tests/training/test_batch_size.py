"""How many tokens a device takes at a time: found by doubling, and remembered."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from winnow.training.batch_size import FOLDER, cached_batch_tokens, double_until_full


class Device:
    """Takes `limit` tokens, and remembers what was tried on it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.tried = limit, list[int]()

    def __call__(self, tokens: int) -> bool:
        self.tried.append(tokens)
        return tokens <= self.limit


@pytest.mark.parametrize(
    ("limit", "share", "wanted", "tried"),
    [
        (10_000, 4096, (4096, False), [1024, 2048, 4096]),
        (3000, 4096, (2048, True), [1024, 2048, 4096]),
        (10_000, 3000, (3000, False), [1024, 2048, 3000]),
        (100, 4096, (512, True), [1024]),
        (10_000, 256, (256, False), []),
    ],
)
def test_it_doubles_up_to_the_limit_or_the_share(
    limit: int, share: int, wanted: tuple[int, bool], tried: list[int]
) -> None:
    device = Device(limit)
    assert double_until_full(device, 512, share) == wanted
    assert device.tried == tried


def test_it_is_found_once_for_a_model_a_length_and_a_device(tmp_path: Path) -> None:
    key = {"model": "a", "longest": 512}
    assert cached_batch_tokens(tmp_path, key, Device(3000), 512, 8192) == 2048
    again = Device(3000)
    assert cached_batch_tokens(tmp_path, key, again, 512, 8192) == 2048
    assert cached_batch_tokens(tmp_path, key, again, 512, 1000) == 1000  # a step's share is less
    assert again.tried == []
    assert cached_batch_tokens(tmp_path, {**key, "longest": 256}, again, 256, 8192) == 2048
    assert again.tried == [512, 1024, 2048, 4096]
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_a_larger_share_is_tried_from_where_it_was_left(tmp_path: Path) -> None:
    assert cached_batch_tokens(tmp_path, {}, Device(10**6), 512, 2048) == 2048
    device = Device(5000)
    assert cached_batch_tokens(tmp_path, {}, device, 512, 8192) == 4096
    assert device.tried == [4096, 8192]


@pytest.mark.parametrize("damaged", ["", "{", "[1]"])
def test_a_damaged_memory_is_found_anew(tmp_path: Path, damaged: str) -> None:
    assert cached_batch_tokens(tmp_path, {}, Device(6000), 512, 8192) == 4096
    (entry,) = (tmp_path / FOLDER).iterdir()
    entry.write_text(damaged)
    assert cached_batch_tokens(tmp_path, {}, Device(3000), 512, 8192) == 2048
    assert json.loads(entry.read_text())["tokens"] == 2048


def test_the_memory_is_replaced_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_batch_tokens(tmp_path, {"model": "a"}, Device(3000), 512, 2048)
    (entry,) = (tmp_path / FOLDER).iterdir()
    before = entry.read_bytes()

    def cut(source: object, target: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "replace", cut)
    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError):
        cached_batch_tokens(tmp_path, {"model": "a"}, Device(9000), 512, 8192)
    assert entry.read_bytes() == before and list((tmp_path / FOLDER).iterdir()) == [entry]
