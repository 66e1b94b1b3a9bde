"""What a training takes of each device is estimated before it starts; what cannot fit is refused with what would."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import REPOSITORY
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import Encoded, encode
from winnow.estimate.cost import StageCost
from winnow.estimate.layout import layout_of
from winnow.estimate.training_memory import TrainingMemory
from winnow.hardware.compute import fastest_dtype, training_precision
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained
from winnow.training import fit as fitting
from winnow.training.dist_env import DistEnv
from winnow.training.fit import Batching, fit
from winnow.training.module import Recovery, Schedule
from winnow.training.preflight import TrainingMemoryPlan, plan_training, training_memory

GB = 10**9
ASKED: dict[str, Any] = {"tokens_per_device": 0, "share": 8192, "longest": 512, "total_tokens": 1e6}


def llama_8b(trained_share: float, bytes_each: float = 4.0) -> TrainingMemory:
    """An 8-billion-parameter model from its configuration; nothing of it in memory."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    found = training_memory(model, Run(Path(), device="cuda"), mixed=True)
    parameters = found.spec.parameters
    return dataclasses.replace(
        found,
        weights_bytes=int(bytes_each * parameters),
        cast_parameters=found.cast_parameters if bytes_each == 4 else 0,
        trainable_parameters=int(trained_share * parameters),
        adapters=trained_share < 1,
    )


def flown(
    found: TrainingMemory, usable_gb: float, world: DistEnv | None = None, parallel: str = "auto", **asked: Any
) -> TrainingMemoryPlan:
    run = Run(Path(), device="cuda", parallel=parallel, tflops=100.0)
    return plan_training(found, run, world or DistEnv(), **{**ASKED, **asked}, usable=int(usable_gb * GB))


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        flown(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_it_takes_as_much_at_a_time_as_fits() -> None:
    lora = llama_8b(0.005)
    large, middle = flown(lora, 400), flown(lora, 80)
    assert (large.tokens, large.checkpointing) == (8192, False)
    assert 512 <= middle.tokens < 8192
    assert middle.needed_bytes <= 80 * GB
    assert large.seconds == middle.seconds == pytest.approx(1e6 * 4.01 * 8.03e9 / (0.4 * 100e12), rel=0.01)


def test_activations_are_recomputed_only_where_they_do_not_fit() -> None:
    lora = llama_8b(0.005)
    least = lora.needed_bytes(8192) / GB
    asked = {"tokens_per_device": 8192}
    assert not flown(lora, least + 1, **asked).checkpointing
    assert flown(lora, least - 1, **asked).checkpointing
    assert "activations recomputed" in str(flown(lora, least - 1, **asked))


def test_weights_are_sharded_only_where_one_device_cannot_hold_them() -> None:
    full, two = llama_8b(1.0), DistEnv(size=8, local_size=8)
    assert flown(full, 45, two).sharded
    assert not flown(full, 200, two).sharded
    assert flown(full, 200, two, parallel="fsdp").sharded
    assert "with hardware.parallel=fsdp" in refused(full, 45, DistEnv(), "auto") + refused(full, 45, two, "ddp")


def test_the_refusal_says_what_would_fit() -> None:
    assert "qlora" in refused(llama_8b(0.005), 20)
    assert "tokens_per_device=" in refused(llama_8b(0.005), 55, tokens_per_device=65536, longest=64, share=10**6)
    assert "smaller model" in refused(llama_8b(1.0), 1)
    assert "usable" in refused(llama_8b(1.0), 45, DistEnv(), "ddp")


def test_quantized_weights_are_not_sharded() -> None:
    quantized = llama_8b(0.005, bytes_each=0.56)
    assert "set hardware.parallel=ddp" in refused(quantized, 45, DistEnv(2, 0, 2, 0), "fsdp")
    assert not flown(quantized, 45, DistEnv(2, 0, 2, 0)).sharded


@pytest.mark.parametrize("mixed", [True, False])
def test_the_forecast_of_a_stage_and_the_check_before_its_training_agree(mixed: bool) -> None:
    lm = trained(dtype="float32")
    checked = training_memory(lm.model, Run(Path()), mixed).needed_bytes(4096)
    plan = layout_of(lm)
    parameters = sum(t.numel for t in plan.tensors.values())
    cost = StageCost.trained(plan, Calibration(), 1, 4096, parameters, 0, mixed, adapters=False)
    assert cost.moved_bytes + cost.device_bytes + cost.fragmentation_bytes == pytest.approx(checked, rel=1e-3)


def rows_of(tokenizer: Any) -> list[Encoded]:
    return encode(documents(Calibration(), 100, seed=0), tokenizer, 64)


def test_a_training_that_cannot_fit_is_refused_before_it_starts(
    tiny: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    lm = pretrained(str(tiny), dtype="float32")
    run = Run(tmp_path, memory_limit_bytes=1000)
    with pytest.raises(UserError, match="training needs about"):
        fit(lm.model, rows_of(lm.tokenizer), Schedule(1e-3, 4), Batching(512), run)
    assert log_lines == [] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_recomputed_activations_give_the_same_gradients(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    from winnow.method.lora import Lora, add_adapters

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        lm = pretrained(str(tiny), dtype="float32")
        model: Any = add_adapters(lm.model, Lora(), 0) if trained == "adapters" else lm.model
        kept: dict[str, torch.Tensor] = {}

        def keep(module: Recovery, optimizer: Any) -> None:
            kept.update({n: p.grad.clone() for n, p in module.student.trainable.items()})

        monkeypatch.setattr(Recovery, "on_before_optimizer_step", keep)
        flight = TrainingMemoryPlan(512, 0, 0, checkpointing=checkpointing)
        monkeypatch.setattr(fitting.preflight, "plan_training", lambda *a, **k: flight)
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        fit(model, rows_of(lm.tokenizer), Schedule(1e-3, 1), Batching(512), Run(folder))
        return kept

    whole, recomputed = gradients(False), gradients(True)
    assert whole and whole.keys() == recomputed.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


PEAK = """
import re, sys
from pathlib import Path
import torch
from winnow.method.lora import Lora, add_adapters
from winnow.nano.embedded import trained
from winnow.training import fit as fitting
from winnow.data.corpus import documents
from winnow.data.encoding import encode
from winnow.training.module import Schedule
from winnow.core.types import Calibration
from winnow.hardware.run import Run

lm = trained(dtype="float32")
rows = encode(documents(Calibration(), 500, 0), lm.tokenizer, 128)
model = add_adapters(lm.model, Lora(), 0)
run = Run(Path(sys.argv[1]))
check, flights = fitting.preflight.plan_training, []
fitting.preflight.plan_training = lambda *a, **k: flights.append(check(*a, **k)) or flights[-1]
fitting.fit(model, rows, Schedule(1e-3, 5), fitting.Batching(int(sys.argv[2])), run, precision=sys.argv[3])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
print(flights[0].needed_bytes, peak)
"""


def test_the_peak_is_as_estimated(tmp_path: Path) -> None:
    precision = training_precision(fastest_dtype("cpu"))  # the other one would take minutes
    line = [sys.executable, "-c", PEAK, str(tmp_path), "4096", precision]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=170, check=False)
    assert ended.returncode == 0, ended.stderr
    estimated, measured = (int(x) for x in ended.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.2)
