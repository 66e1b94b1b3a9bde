"""Training on a CUDA device: packed attention, LoRA and QLoRA, the batch size, and two devices where there are two."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.lora import Lora
from winnow.model.packed_attention import attention, document_attention
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS
from winnow.training.batch_size import FOLDER

DEVICE = "cuda"
LENGTHS = (5, 64, 1, 130, 33)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def run_there(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    calibration = Calibration(samples=64, max_length=128)
    return Run(tmp_path / "run", device=DEVICE, calibration=calibration)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("window", [None, 16])
def test_packed_attention_is_that_of_each_document_alone(heads: tuple[int, int], window: int | None) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), 64) for h in (heads[0], heads[1], heads[1])]
    row = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16, generator=generator).requires_grad_() for s in shapes]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    packed, _ = attention(torch.nn.Module(), *row, None, sliding_window=window, cu_seqlens=bounds)

    plain = [x.detach().float().requires_grad_() for x in row]
    parts = zip(*(x.split(list(LENGTHS), dim=2) for x in plain), strict=True)
    expected = torch.cat([document_attention(*x, None, 0.0, window, None).transpose(1, 2) for x in parts], dim=1)
    weights = torch.randn(expected.shape, device=DEVICE, generator=generator)
    (packed.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(packed.float(), expected, rtol=2e-2, atol=2e-2)
    for ours, reference in zip(row, plain, strict=True):
        assert ours.grad is not None and reference.grad is not None
        difference = (ours.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert difference < 2e-2


def test_a_document_has_no_gradient_from_the_others() -> None:
    shape = (1, 2, sum(LENGTHS), 64)
    row = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    out, _ = attention(torch.nn.Module(), *row, None, cu_seqlens=bounds)
    out[:, : LENGTHS[0]].float().square().sum().backward()
    for x in row:
        assert x.grad is not None
        assert x.grad[:, :, LENGTHS[0] :].abs().max() == 0
        assert x.grad[:, :, : LENGTHS[0]].abs().max() > 0


def lost_and_regained(stage: Any, run: Run) -> tuple[float, float]:
    """Held-out loss of the embedded model, half of its weights pruned, before and after the stage."""
    from winnow.method.prune import Magnitude

    pruned = Magnitude(0.6)(pretrained(str(WEIGHTS)), run).lm
    record = stage(pruned, run).notes["training"]
    return record["held_out_loss_before"], record["held_out_loss"]


def test_lora_wins_back_what_pruning_lost(run_there: Run) -> None:
    before, after = lost_and_regained(Lora(steps=60, held_out=64, tokens_per_batch=4096), run_there)
    assert after < 0.7 * before
    # what was found is remembered, and lies within the device
    (file,) = (run_there.folder / FOLDER).iterdir()
    entry = json.loads(file.read_text())
    assert entry["tokens"] >= entry["longest"] and entry["hardware"] == torch.cuda.get_device_name()


def test_qlora_wins_back_what_pruning_lost(run_there: Run) -> None:
    pytest.importorskip("bitsandbytes")
    from winnow.method.qlora import QLoRA

    before, after = lost_and_regained(QLoRA(steps=60, held_out=64, tokens_per_batch=4096), run_there)
    assert after < 0.7 * before


def test_a_batch_that_does_not_fit_is_not_taken(run_there: Run) -> None:
    from winnow.training.batch_size import double_until_full, fits_on_cuda

    size = torch.cuda.get_device_properties(0).total_memory
    weight = torch.ones((), device=DEVICE, requires_grad=True)

    def step(tokens: int) -> torch.Tensor:
        return (weight * torch.zeros(tokens, 1 << 20, dtype=torch.uint8, device=DEVICE)).float().sum()

    usable = size // 2
    tokens, limited = double_until_full(fits_on_cuda(step, [weight], DEVICE, usable, 0), 64, 1 << 20)
    assert limited and 64 <= tokens << 20 < size
    assert weight.grad is None
    assert torch.cuda.memory_allocated() < size // 100


@two_devices
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_two_devices_train_one_model(tmp_path: Path, method: str, parallel: str) -> None:
    if (method, parallel) == ("qlora", "fsdp"):
        pytest.skip("quantized weights are not sharded")
    knobs = {"steps": 40, "held_out": 64, "tokens_per_batch": 8192, "max_length": 128}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += [str(REPOSITORY / "train.py"), f"method=[{method}]", "hardware=l40s_x2", f"hardware.parallel={parallel}"]
    line += ["hardware.memory_limit_bytes=null", f"outputs={tmp_path}", f"output={tmp_path / 'artifact'}"]
    line += [f"method.{method}.{knob}={value}" for knob, value in knobs.items()]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=540, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["stages"][-1]
    assert record["training"]["steps"] == 40
    assert record["energy_source"] == "counter"


def test_ligers_kernels_train_to_the_same_loss(run_there: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'winnow[liger]'")
    from winnow.training import kernels

    losses = {}
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(kernels, "fused", lambda *_: contextlib.nullcontext())
        trained = Lora(steps=10, tokens_per_batch=1024)(pretrained(str(WEIGHTS)), run_there)
        losses[fused] = trained.notes["training"]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
