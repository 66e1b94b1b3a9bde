"""What a model is known by: its weights and configuration, read once for each version of them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from winnow.model import manifest


def test_the_hash_follows_the_content_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    first = manifest.content_hash(folder)
    (folder / "README.md").write_text("a card")
    assert manifest.content_hash(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)  # as many bytes as before
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert manifest.content_hash(folder) != first


def test_weights_are_read_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    first = manifest.content_hash(folder)
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert manifest.content_hash(folder) == first
