"""`dry_run=true`: what is printed, that nothing is written, and that the forecasts come true."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.llama_8b import LLAMA_8B
from tests.peak import measured_peak, predicted_peak
from tests.test_conf import composed
from winnow.build.command_settings import dry_run
from winnow.build.search_settings import search_settings
from winnow.core.cli import options
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.estimate.machine import Machine
from winnow.method.knobs import Knob
from winnow.model.pretrained import pretrained
from winnow.report.dry_run import compress_table, countable, forecast, search_table

FOLDER_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **LLAMA_8B}
MACHINE = Machine(flops=1e14, traffic=1e10, sorts=1e7, process_bytes=6 * 10**8)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published configuration and nothing else."""
    folder = tmp_path_factory.mktemp("models") / "Llama-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FOLDER_8B))
    return folder


@pytest.fixture
def known_machine() -> Iterator[None]:
    with mock.patch("winnow.estimate.machine.measure_machine", lambda *args: MACHINE):
        yield


def cells(table: str, start: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line)


def test_compress_prints_a_table_and_writes_nothing(command, tmp_path: Path) -> None:
    ended = command("compress", "method=[wanda,rtn]", "dry_run=true", outputs=tmp_path / "outputs")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert cells(ended.stdout, "strategy")[:3] == ["strategy", "on disk (MB)", "weights (MB)"]
    assert cells(ended.stdout, "base")[1] == "9.11"
    assert cells(ended.stdout, "wanda(sparsity=0.5")[-1] == "yes"
    assert cells(ended.stdout, "rtn(bits=4, group_size=64)")[1] == "2.86"
    assert "it fits" in ended.stdout.splitlines()[-1]
    assert not (tmp_path / "outputs").exists()


def test_search_prints_its_space_and_makes_no_study(command, tmp_path: Path) -> None:
    arguments = ["method=[magnitude,rtn]", "method.rtn.bits=choice(3,4)", "budget.trials=7", "dry_run=true"]
    ended = command("search", *arguments, outputs=tmp_path / "outputs")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    shown = [re.split(r"\s{2,}", line)[0] for line in ended.stdout.splitlines() if "  yes" in line]
    assert shown[0] == "base"
    assert [name.partition("(")[0] for name in shown[1:]] == sorted(name.partition("(")[0] for name in shown[1:])
    assert {"rtn(bits=3, group_size=64)", "rtn(bits=4, group_size=64)"} <= set(shown)
    assert not any("bits=2" in name or "bits=8" in name for name in shown)
    assert "budget 7 trials" in ended.stdout.splitlines()[-1]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("compress", ["method=[rtnn]"], ["did you mean rtn"]),
        ("compress", ["method.rtn.bits=5"], ["method.rtn.bits=5"]),
        ("compress", ["model=local", "model.path=./not/there"], ["no such folder"]),
        ("search", ["method.rtn.bits=choice(4,5)"], ["method.rtn.bits=5"]),
    ],
)
def test_bad_input_is_what_it_is_without(command, tmp_path: Path, script: str, arguments: list[str], parts) -> None:
    ended = command(script, *arguments, "dry_run=true", outputs=tmp_path / "outputs")
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert all(part in ended.stderr for part in parts)
    assert ended.stdout == "" and not (tmp_path / "outputs").exists()


@pytest.mark.usefixtures("known_machine")
class TestFromAConfigurationAlone:
    def table(self, folder: Path, *overrides: str) -> str:
        return compress_table(dry_run(composed("compress", "model=local", f"model.path={folder}", *overrides)))

    def test_it_needs_neither_weights_nor_the_hardware(self, llama_8b: Path) -> None:
        found = self.table(llama_8b, "method=[rtn]", "hardware=rtx4090")
        assert found.startswith("Llama-8B on rtx4090, 25.8 GB of memory; served by transformers: 1 x 640 tokens")
        base, packed = cells(found, "base"), cells(found, "rtn(bits=4, group_size=64)")
        assert float(base[1]) == pytest.approx(16.06, rel=0.01)
        assert float(packed[1]) == pytest.approx(5.8, rel=0.02)
        assert base[-1] == packed[-1] == "yes"

    def test_what_does_not_fit_says_why_and_what_would(self, llama_8b: Path) -> None:
        found = self.table(llama_8b, "method=[rtn]", "hardware=rtx4090", "hardware.memory_limit_bytes=12000000000")
        assert cells(found, "rtn")[-1] == "no"
        assert "base: serving 1 x 640 tokens needs 1" in found
        assert "it fits at 8 bits (int8) with 1 x 640 tokens" in found
        assert "rtn(bits=4, group_size=64): serving 1 x 640 tokens needs 1" in found
        assert "it fits with hardware.runtime=vllm" in found
        assert "it does not fit" in found.splitlines()[-1]

    def test_a_model_without_a_tokenizer_is_calibrated_at_the_most(self, llama_8b: Path) -> None:
        _, found, _ = forecast(
            dry_run(composed("compress", "model=local", f"model.path={llama_8b}", "method=[wanda]", "hardware=a100"))
        )
        states = 128 * 512 * 4096 * 2
        assert found.host_peak_bytes > found.steps[0].plan.memory_bytes + states
        assert 10**9 < found.device_peak_bytes < 8 * 10**9

    def test_a_quantized_base_is_refused_as_without(self, llama_8b: Path, tmp_path: Path) -> None:
        settings = {**FOLDER_8B, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="is quantized already"):
            self.table(tmp_path, "method=[rtn]")

    def test_an_unknown_architecture_is_one_message(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
        with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded"):
            self.table(tmp_path, "method=[rtn]")


@pytest.mark.usefixtures("known_machine")
def test_every_method_has_a_forecast() -> None:
    for name in options("method"):
        if name != "pretrain":
            table = compress_table(dry_run(composed("compress", f"method=[{name}]")))
            assert cells(table, name)[-1] in ("yes", "no"), table


@pytest.mark.usefixtures("known_machine")
def test_every_base_that_lies_here_has_one() -> None:
    for name in ("nano", "nano_untrained"):
        assert cells(compress_table(dry_run(composed("compress", f"model={name}", "method=[]"))), "base")[-1] == "yes"


@pytest.mark.usefixtures("known_machine")
def test_a_method_that_cannot_be_applied_is_a_row_with_its_reason(tiny: Path) -> None:
    overrides = ["model=local", f"model.path={tiny}", "method=[rtn]", "method.rtn.group_size=128", "dry_run=true"]
    cfg = composed("search", *overrides, hydra=True)
    table = search_table(search_settings(cfg, {"method.rtn.group_size": Knob(choices=(64, 128))}))
    assert cells(table, "rtn(bits=4, group_size=128)")[-1] == "no"
    assert "group_size=128 does not divide the width 64" in table


@pytest.mark.parametrize(
    "arguments",
    [("method=[rtn]",), pytest.param(("method=[wanda,lora]", "method.lora.steps=5"), marks=pytest.mark.slow)],
    ids=str,
)
def test_peak_memory_is_as_forecast(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    predicted = predicted_peak(*arguments)
    assert predicted == pytest.approx(measured_peak(*arguments, outputs=tmp_path), rel=0.2)


def test_no_weight_is_read(tiny: Path, tmp_path: Path) -> None:
    """The texts of the calibration are counted with the tokenizer and the configuration alone."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"cut")
    lm = pretrained(str(folder), weights=False)
    assert countable(lm, Calibration(samples=4, max_length=64), 0).count().tokens > 4
