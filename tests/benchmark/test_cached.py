"""The base model's outcomes are known after the first study that asked the same items, and only then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark.test_score import harness
from winnow.benchmark import harness as module
from winnow.benchmark.cached import FOLDER, CachedBenchmark
from winnow.benchmark.samples import FILE, read
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS


def test_items_are_put_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    lm, benchmark, about = pretrained(str(WEIGHTS)), harness("nano", limit=3), {"model": "m"}

    def scored(name: str, benchmark: Any, about: dict[str, Any]) -> Any:
        (tmp_path / name).mkdir()
        return CachedBenchmark(benchmark, tmp_path / "cache", about)(lm, Run(tmp_path / name))

    first = scored("first", benchmark, about)
    serving = module.serving
    monkeypatch.setattr(module, "serving", lambda *_, **__: pytest.fail("it is put to the model again"))
    assert scored("again", benchmark, about) == first
    assert read(tmp_path / "again") == read(tmp_path / "first")
    assert "the outcomes of 18 items are known" in log_lines[-1]

    asked = []
    monkeypatch.setattr(module, "serving", lambda *a, **k: asked.append(1) or serving(*a, **k))
    scored("another model", benchmark, {"model": "n"})
    scored("another way", dataclasses.replace(benchmark, batch_size=2), about)
    scored("other items", dataclasses.replace(benchmark, limit=2), about)
    assert len(asked) == 3 and len(list((tmp_path / "cache" / FOLDER).iterdir())) == 4
    assert all((entry / FILE).is_file() for entry in (tmp_path / "cache" / FOLDER).iterdir())
