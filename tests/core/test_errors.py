"""Bad input: one clear message that names the option and a way out, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
from pathlib import Path
from typing import ClassVar

import pytest

from winnow.core.errors import UserError
from winnow.model.load import load_model, load_tokenizer
from winnow.model.loading import Loading
from winnow.model.pretrained import pretrained

COMMAND_LINES = [
    ("compress", ["method=[rtnn]"], ["method=rtnn", "did you mean rtn"]),
    ("compress", ["model=nanoo"], ["model=nanoo", "did you mean nano"]),
    ("compress", ["method.rtn.bits=5"], ["method.rtn.bits=5", "2, 3, 4, 8"]),
    ("compress", ["method.rtn.bit=4"], ["method.rtn.bit", "--cfg job"]),
    ("compress", ["method=[rtn,wanda]"], ["method=[rtn,wanda]", "write method=[wanda,rtn]"]),
    ("compress", ["method=[rtn,nf4]"], ["both quantize", "keep one"]),
    (
        "compress",
        ["method=[wanda]", "method.wanda.pattern=2:4", "method.wanda.sparsity=0.3"],
        ["clashes", "leave sparsity"],
    ),
    ("compress", ["model=local", "model.path=./not/there"], ["model.path=./not/there", "no such folder"]),
    ("compress", ["model=local"], ["model.path", "model=local model.path="]),
    ("compress", ["hardware=l40s_x2"], ["hardware=l40s_x2", "use hardware=cpu"]),
    (
        "compress",
        ["method=[rtn]", "method.wanda.sparsity=0.6"],
        ["method.wanda.sparsity: wanda is not among the methods", "method=[...,wanda]"],
    ),
    (
        "compress",
        ["calibration.source=none.jsonl", "method=[wanda]"],
        ["calibration.source=none.jsonl", "no such file"],
    ),
    ("train", ["method.lora.rank=0"], ["method.lora.rank=0", "4, 8, 16"]),
    ("evaluate", ["benchmark.limit=0"], ["benchmark.limit=0", "at least 1"]),
    ("evaluate", ["benchmark=gsm9k"], ["benchmark=gsm9k", "did you mean gsm8k"]),
    ("evaluate", ["benchmark=gsm8k", "benchmark.data_dir=/nowhere"], ["benchmark.data_dir=/nowhere"]),
    ("search", ["objectives=[acuracy]"], ["acuracy", "did you mean accuracy"]),
    ("search", ["objectives=[]"], ["objectives=[] is empty"]),
    ("search", ["method=[]"], ["the space is empty", "method=[rtn,nf4]"]),
    ("search", ["method.rtn.bits=choice(4,5)"], ["method.rtn.bits=5", "2, 3, 4, 8"]),
    ("search", ["budget.trials=0"], ["budget.trials=0", "more than 0"]),
    ("search", ["model=nano,local"], ["one search for each model"]),
    ("search", ["budget.trials=many"], ["budget.trials=many", "a whole number or null"]),
    ("search", ["first_slots=[quantise]"], ["first_slots=[quantise]", "quantize"]),
    ("compress", ["seed=x"], ["seed=x", "a whole number"]),
    ("search", ["keep=some"], ["keep=some", "front, all, none"]),
    ("search", ["agent=tpee"], ["agent=tpee", "did you mean tpe"]),
]


@pytest.mark.parametrize(
    ("script", "arguments", "parts"), COMMAND_LINES, ids=lambda v: "-".join(v) if isinstance(v, list) else v
)
def test_a_bad_command_line_is_one_message_and_exit_code_2(command, tmp_path, script, arguments, parts) -> None:
    ended = command(script, *arguments, outputs=tmp_path / "outputs")
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith(f"{script}.py: ")
    for part in parts:
        assert part in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_half_written_file_of_weights_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"half-written: model\.safetensors is cut short"):
        pretrained(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        pretrained(str(folder))


def test_a_folder_without_configuration_or_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        pretrained(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        pretrained(str(folder))


def test_pickle_weights_are_refused_unless_asked_for(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle weights \(pytorch_model\.bin\).*model\.allow_pickle=true"):
        pretrained(str(folder))
    lm = pretrained(str(folder), allow_pickle=True)
    assert lm.model.num_parameters() > 0


def test_a_model_with_code_of_its_own_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(UserError, match=r"brings its own code.*model\.trust_remote_code=true"):
        pretrained(str(folder))


def test_a_tokenizer_without_a_pad_token_is_given_one(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder), Loading())
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer(["a", "a b c"], padding=True)["input_ids"][0]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [("GatedRepoError", r"needs a login: .*HF_TOKEN"), ("RepositoryNotFoundError", "no such model on the hub")],
)
def test_models_behind_a_login_say_how_to_log_in(monkeypatch, name: str, message: str) -> None:
    import httpx
    import transformers
    from huggingface_hub import errors

    answer = httpx.Response(403, request=httpx.Request("GET", "https://localhost"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise getattr(errors, name)("no", response=answer)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match=message):
        load_model("meta/llama", Loading())


def test_a_hub_model_without_network_says_so(monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path=some/model .*hub cannot be reached"):
        load_model("some/model", Loading())


@pytest.mark.parametrize("quantizer", ["rtn", "nf4", "int8"])
@pytest.mark.parametrize("second", [None, "wanda", "nf4"])
def test_a_quantized_model_is_not_compressed_again(tiny: Path, tmp_path: Path, run_in, quantizer: str, second) -> None:
    from tests.method.test_conformance import stage_of
    from winnow.method.pipeline import compress

    first = compress(pretrained(str(tiny)), {quantizer: stage_of(quantizer)}, run_in, tmp_path / "first")
    stages = {second: stage_of(second)} if second else {}
    with pytest.raises(UserError, match=r"first is quantized already .* made of \(tiny\)"):
        compress(pretrained(str(first.path)), stages, run_in, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, tiny: Path, tmp_path: Path) -> None:
    from winnow.model.save import save

    lm = pretrained(str(tiny))
    output = tmp_path / "artifact"
    save(pretrained(str(tiny)), output)
    before = {p.name: p.read_bytes() for p in output.iterdir()}

    def full(folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(lm.model), "save_pretrained", lambda self, folder, **kw: full(folder))
    with pytest.raises(UserError, match="the disk is full"):
        save(lm, output)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


class TestStudy:
    """Studies that cannot be gone on with."""

    from winnow.core.types import Objective

    OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False))
    FINGERPRINT: ClassVar = {
        "model": {"name": "a", "sha256": "1"},
        "benchmark": {"limit": 10},
        "hardware": {"name": "cpu"},
    }

    def open(self, folder: Path, **changes: object):
        from winnow.study.opening import open_study

        fingerprint = {**self.FINGERPRINT, **changes}
        return open_study("s", f"sqlite:///{folder / 'study.db'}", self.OBJECTIVES, fingerprint)

    @pytest.mark.parametrize(
        ("changes", "difference"),
        [
            ({"model": {"name": "b", "sha256": "2"}}, r"model\.name: a there, b here"),
            ({"benchmark": {"limit": None}}, r"benchmark\.limit: 10 there, null here"),
            ({"hardware": {"name": "a100"}}, r"hardware\.name: cpu there, a100 here"),
        ],
    )
    def test_of_another_kind_is_refused_with_the_difference(self, tmp_path: Path, changes, difference: str) -> None:
        self.open(tmp_path)
        self.open(tmp_path)  # the same goes on
        with pytest.raises(UserError, match=f"{difference}.*study=NAME"):
            self.open(tmp_path, **changes)

    def test_with_other_objectives_is_refused(self, tmp_path: Path) -> None:
        from winnow.study.opening import open_study

        self.open(tmp_path)
        with pytest.raises(UserError, match="objectives"):
            open_study("s", f"sqlite:///{tmp_path / 'study.db'}", self.OBJECTIVES[::-1], self.FINGERPRINT)
        with pytest.raises(UserError, match="objectives"):
            open_study("s", f"sqlite:///{tmp_path / 'study.db'}", self.OBJECTIVES[:1], self.FINGERPRINT)

    @pytest.mark.parametrize("damage", ["garbage", "cut", "scribbled"])
    def test_in_a_damaged_file_is_refused_and_left_alone(self, tmp_path: Path, damage: str) -> None:
        self.open(tmp_path).close()
        path = tmp_path / "study.db"
        content = path.read_bytes()
        damaged = {
            "garbage": b"not a database at all" * 100,
            "cut": content[: len(content) // 2],
            "scribbled": content[:4096] + b"\xff" * 8192 + content[12288:],
        }[damage]
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"study\.db is damaged .*move it away"):
            self.open(tmp_path)
        assert path.read_bytes() == damaged

    def test_the_check_sees_a_sound_database_as_sound(self, tmp_path: Path) -> None:
        from winnow.study.storage import check_sqlite

        self.open(tmp_path)
        check_sqlite(tmp_path / "study.db")
        with sqlite3.connect(tmp_path / "study.db") as connection:
            assert connection.execute("select count(*) from studies").fetchone() == (1,)


def test_an_error_below_a_folder_named_as_a_library_is_a_defect(tmp_path: Path) -> None:
    from winnow.core.cli import is_user_mistake

    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "mine.py").write_text("def divide():\n    return 1 / 0\n")
    code = compile((tmp_path / "hydra" / "mine.py").read_text(), str(tmp_path / "hydra" / "mine.py"), "exec")
    names: dict[str, object] = {}
    exec(code, names)
    with pytest.raises(ZeroDivisionError) as error:
        names["divide"]()  # type: ignore[operator]
    assert not is_user_mistake(error.value)
