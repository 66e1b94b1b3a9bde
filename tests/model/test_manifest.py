"""What a model is known by: all files that loading reads, as they are now; whatever lies beside them does not matter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from winnow.core import hashes
from winnow.core.cache import cache_root
from winnow.model import folder, manifest
from winnow.model.pretrained import pretrained


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """With an adapter and all kinds of files of a tokenizer beside it."""
    made = Path(shutil.copytree(tiny, tmp_path / "model"))
    (made / folder.ADAPTER).mkdir()
    for name in (*folder.ADAPTER_FILES[:2],):
        (made / folder.ADAPTER / name).write_text("{}")
    for name in ("chat_template.jinja", "special_tokens_map.json", "prompt.json", "vocab.json", "tokenizer.model"):
        (made / name).write_text("{}")
    return made


def flip_last_byte(file: Path) -> None:
    """As many bytes as before, and the time of its change stays."""
    before = file.stat()
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_file_that_decides_answers_decides_the_hash(model: Path) -> None:
    names = list(folder.content_files(model))
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < {
        *names
    }
    assert {"chat_template.jinja", "adapter/adapter_model.safetensors", "prompt.json"} < {*names}
    seen = {manifest.content_hash(model)}
    for name in names:
        flip_last_byte(model / name)
        assert manifest.content_hash(model) not in seen, name
        seen.add(manifest.content_hash(model))


BESIDE = ("optimizer.pt", "checkpoint-500/optimizer.pt", "original/consolidated.00.pth", ".git/objects/ab/cd", "README.md",
          ".cache/huggingface/x.metadata", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx",
          "trainer_state.json", "manifest.json", "model.safetensors.index.json", "model-Q4_K.gguf")  # fmt: skip


def test_what_loading_does_not_read_counts_nothing(model: Path, tmp_path: Path) -> None:
    first, sizes = manifest.content_hash(model), manifest.sizes(model)
    for name in BESIDE:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"[" * 1000)
    assert manifest.content_hash(Path(shutil.copytree(model, tmp_path / "copy"))) == first
    assert manifest.sizes(model) == sizes
    assert sizes["size_bytes"] == sum(path.stat().st_size for path in folder.content_files(model).values())


def test_a_large_file_is_read_once_for_each_of_its_versions(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)
    weights = model / "model.safetensors"
    read: list[str] = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or whole(file, kind))

    def hashed() -> int:
        """How often it was read for two questions; the answer is right."""
        read.clear()
        for _ in range(2):
            assert hashes.sha256(weights) == hashlib.sha256(weights.read_bytes()).hexdigest()
        return len(read)

    os.utime(weights)
    assert hashed() == 2  # written a moment ago: it may be written again within one tick of the clock
    os.utime(weights, (1e9, 1e9))
    assert hashed() == 1
    other = model / "other"
    other.write_bytes(weights.read_bytes())
    flip_last_byte(other)
    os.utime(other, (1e9, 1e9))
    other.replace(weights)  # of the same size and time
    assert hashed() == 1
    weights.rename(model / "moved.safetensors")
    (model / "moved.safetensors").rename(weights)
    assert hashed() == 0
    next((cache / "hashes").iterdir()).write_text("damaged")
    assert hashed() <= 1


def test_a_cache_that_cannot_be_written_costs_time_only(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)
    cache.write_text("a file")
    assert manifest.content_hash(model) == manifest.content_hash(model)


def test_the_users_cache_is_where_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINNOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/winnow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "winnow"


@pytest.fixture
def artifact(tiny: Path, tmp_path: Path) -> Path:
    """With a manifest that says what was done."""
    made = Path(shutil.copytree(tiny, tmp_path / "artifact"))
    manifest.write(made, {"stages": [{"method": "wanda"}], **manifest.describe_files(made)})
    return made


def another_weight(made: Path) -> None:
    flip_last_byte(made / "model.safetensors")


def another_setting(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))


def another_adapter(made: Path) -> None:
    (made / folder.ADAPTER).mkdir()
    (made / folder.ADAPTER / "adapter_config.json").write_text("{}")


def another_template(made: Path) -> None:
    (made / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("change", "name", "lineage"),
    [
        (lambda made: None, "", True),
        (another_weight, "model.safetensors", False),
        (another_setting, "config.json", False),
        (another_adapter, "adapter/adapter_config.json", False),
        (another_template, "chat_template.jinja", True),
    ],
)
def test_a_manifest_is_believed_of_the_files_it_was_written_for(
    artifact: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None], name: str, lineage: bool
) -> None:
    before = pretrained(str(artifact)).sha256()
    change(artifact)
    lm = pretrained(str(artifact)) if name != "adapter/adapter_config.json" else None
    found = lm.manifest if lm else manifest.read_verified(artifact)
    assert bool(found.get("stages")) == lineage
    assert bool(caplog.text) == bool(name) and name in caplog.text
    if lm:
        assert (lm.sha256() == before) == (not name)
    if lineage:
        assert found["sha256"] == manifest.content_hash(artifact)
