"""What the first stages of a pipeline made is found again by the next one that begins alike, and by no other."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method import prefixes
from winnow.method.bnb import NF4
from winnow.method.kv import KV
from winnow.method.lora import Lora
from winnow.method.pipeline import compress
from winnow.method.prune import Wanda
from winnow.method.rtn import RTN
from winnow.model import manifest
from winnow.model.pretrained import pretrained

LORA = Lora(steps=2, tokens_per_batch=256, rank=4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(prefixes, "DISK_BYTES_PER_SECOND", 1e12)  # small models are made faster than they are written
    (tmp_path / "scratch").mkdir()
    return Run(
        tmp_path / "scratch",
        calibration=Calibration(samples=8),
        cache=tmp_path / "cache",
        stage_cache_bytes=10**9,
        bars=False,
    )


def made(tiny: Path, run: Run, name: str, **stages: Any) -> dict[str, Any]:
    output = run.folder.parent / name
    compress(pretrained(str(tiny)), stages, run, output)
    return manifest.read(output)


def reused(record: dict[str, Any]) -> list[bool]:
    return [stage.get("reused", False) for stage in record["stages"]]


def test_a_pipeline_goes_on_from_what_another_left_and_makes_the_same(tiny: Path, run: Run) -> None:
    first = made(tiny, run, "a", wanda=Wanda(0.5), lora=LORA, rtn=RTN(4))
    second = made(tiny, run, "b", wanda=Wanda(0.5), lora=LORA, rtn=RTN(3))
    alone = made(tiny, dataclasses.replace(run, stage_cache_bytes=0), "c", wanda=Wanda(0.5), lora=LORA, rtn=RTN(3))
    assert (reused(first), reused(second)) == ([False] * 3, [True, True, False])
    assert second["sha256"] == alone["sha256"] != first["sha256"]
    assert [s["knobs"] for s in second["stages"]] == [s["knobs"] for s in alone["stages"]]
    assert second["base"] == alone["base"]
    assert second["stages"][:2] == [{**record, "reused": True} for record in first["stages"][:2]]
    assert [list(record) for record in alone["stages"]] == [list(record) for record in first["stages"]]
    assert alone["stages"][0]["block_sparsities"] == second["stages"][0]["block_sparsities"]
    assert "dense" not in second


def test_an_artifact_is_the_beginning_of_longer_ones_and_is_not_made_twice(tiny: Path, run: Run) -> None:
    made(tiny, run, "a", wanda=Wanda(0.5))
    assert reused(made(tiny, run, "b", wanda=Wanda(0.5), rtn=RTN(4))) == [True, False]
    again = made(tiny, run, "c", wanda=Wanda(0.5), rtn=RTN(4))
    assert reused(again) == [True, True] and "transformers" in again["runtimes"]
    a, b = (run.folder.parent / name / "model.safetensors" for name in ("b", "c"))
    assert a.samefile(b)


def test_quantized_weights_are_taken_for_what_leaves_them_alone(tiny: Path, run: Run) -> None:
    made(tiny, run, "a", nf4=NF4())
    assert reused(made(tiny, run, "b", nf4=NF4(), kv=KV(group_size=32))) == [True, False]


@pytest.mark.parametrize("change", ["knob", "seed", "calibration", "base", "code", "order"])
def test_nothing_is_taken_from_what_was_made_otherwise(
    tiny: Path, run: Run, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tiny, run, "a", wanda=Wanda(0.5), rtn=RTN(4))
    wanda: Any = Wanda(0.5)
    if change == "knob":
        wanda = Wanda(0.4)
    elif change == "seed":
        run = dataclasses.replace(run, seed=1)
    elif change == "calibration":
        run = dataclasses.replace(run, calibration=Calibration(samples=9))
    elif change == "code":
        monkeypatch.setattr(prefixes, "code_sha256", lambda *_: "changed")
    base = Path(shutil.copytree(tiny, run.folder.parent / "base"))
    if change == "base":
        (base / "chat_template.jinja").write_text("{{ messages }}")
    stages = {"rtn": RTN(4)} if change == "order" else {"wanda": wanda, "rtn": RTN(4)}
    compress(pretrained(str(base)), stages, run, run.folder.parent / "b")
    assert not any(reused(manifest.read(run.folder.parent / "b")))


def test_an_artifact_that_was_changed_in_place_is_not_gone_on_from(tiny: Path, run: Run) -> None:
    first = made(tiny, run, "a", wanda=Wanda(0.5))
    with (run.folder.parent / "a" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x01")
    second = made(tiny, run, "b", wanda=Wanda(0.5))
    assert reused(second) == [False] and second["sha256"] == first["sha256"]
    assert reused(made(tiny, run, "c", wanda=Wanda(0.5))) == [True]  # kept anew


def test_calibration_data_that_changed_under_its_name_is_other_data(tiny: Path, run: Run, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Anna goes to the market.\n\nTom takes a cup for drinking.\n")
    run = dataclasses.replace(run, calibration=Calibration(source=str(texts), samples=2))
    made(tiny, run, "a", wanda=Wanda(0.5), rtn=RTN(4))
    assert reused(made(tiny, run, "b", wanda=Wanda(0.5), rtn=RTN(3))) == [True, False]
    texts.write_text("Tom goes to the lake.\n\nAnna takes a clock for timing.\n")
    assert reused(made(tiny, run, "c", wanda=Wanda(0.5), rtn=RTN(2))) == [False, False]


def entries(run: Run) -> set[str]:
    assert run.cache is not None
    return {path.name for path in (run.cache / prefixes.FOLDER).glob("*")}


def test_the_least_recently_used_go_first_and_none_that_is_read(tiny: Path, run: Run) -> None:
    made(tiny, run, "a", wanda=Wanda(0.1))
    (oldest,) = entries(run)
    assert run.cache is not None
    folder = run.cache / prefixes.FOLDER
    size = sum(p.stat().st_size for p in (folder / oldest).iterdir())
    made(tiny, run, "b", wanda=Wanda(0.2))
    (newer,) = entries(run) - {oldest}
    os.utime(folder / oldest, (1, 1))
    os.utime(folder / newer, (2, 2))
    small = dataclasses.replace(run, stage_cache_bytes=int(2.5 * size))
    reader = os.open(folder / oldest, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    made(tiny, small, "c", wanda=Wanda(0.3))
    assert oldest in entries(run) and newer not in entries(run) and len(entries(run)) == 2
    os.close(reader)
    (third,) = entries(run) - {oldest}
    assert reused(made(tiny, small, "d", wanda=Wanda(0.1), rtn=RTN(4)))[0]  # used: the other one is older now
    assert oldest in entries(run) and third not in entries(run)
    assert sum(p.stat().st_size for e in entries(run) for p in (folder / e).iterdir()) <= small.stage_cache_bytes


def test_a_full_disk_costs_no_trial(tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefixes.shutil, "copytree", full)
    assert made(tiny, run, "a", wanda=Wanda(0.5))["stages"]
    assert entries(run) == set()
