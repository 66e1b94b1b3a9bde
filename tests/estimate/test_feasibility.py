"""What fits where, for models of published size."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import LlamaConfig

from tests.llama_8b import LLAMA_8B
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.estimate.cost import CountedCalibration, StageCost
from winnow.estimate.feasibility import HEADROOM, Feasibility, feasibility
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.estimate.machine import Machine, measure_machine
from winnow.hardware.device import Hardware
from winnow.method.bnb import NF4, Int8
from winnow.method.knobs import Stage
from winnow.method.lora import Lora
from winnow.method.pretrain import Pretrain
from winnow.method.prune import Wanda
from winnow.method.rtn import RTN

GB = 10**9
MACHINE = Machine(flops=300e12, traffic=1e10, sorts=1e9)


@pytest.fixture(scope="module")
def llama_8b() -> ModelLayout:
    config = LlamaConfig(**LLAMA_8B)
    return ModelLayout(config, dense_tensors(config))


def gpu(gigabytes: float, **settings: object) -> Hardware:
    workload = {"prompt_tokens": 3968, "output_tokens": 128}
    return Hardware("gpu", device="cuda", memory_limit_bytes=int(gigabytes * GB), **{**workload, **settings})  # type: ignore[arg-type]


def on(plan: ModelLayout, hardware: Hardware, machine: Machine = MACHINE, **stages: Stage) -> Feasibility:
    return feasibility(plan, stages, hardware, Calibration(), machine)


def test_it_runs_where_it_is_known_to_run(llama_8b: ModelLayout) -> None:
    assert on(llama_8b, gpu(24)).fits
    assert not on(llama_8b, gpu(12)).fits
    assert on(llama_8b, gpu(12), nf4=NF4()).last.fits
    assert on(llama_8b, gpu(12), int8=Int8()).last.fits


def test_it_trains_where_it_is_known_to_train(llama_8b: ModelLayout) -> None:
    assert not on(llama_8b, gpu(80), pretrain=Pretrain()).fits  # 16 bytes a parameter
    assert on(llama_8b, gpu(180), pretrain=Pretrain(tokens_per_batch=512)).fits
    assert on(llama_8b, gpu(80), lora=Lora(tokens_per_batch=1024)).fits  # over weights in single precision
    assert not on(llama_8b, gpu(24), lora=Lora()).fits


def test_packed_integers_save_memory_only_where_the_runtime_computes_with_them(llama_8b: ModelLayout) -> None:
    unpacked, packed = (on(llama_8b, gpu(12, runtime=r), rtn=RTN()).last for r in ("transformers", "vllm"))
    assert unpacked.disk_bytes == packed.disk_bytes < 6.5 * GB
    assert not unpacked.fits and unpacked.weights_bytes == llama_8b.memory_bytes
    assert packed.fits and packed.weights_bytes < 6.5 * GB


def test_a_walk_over_the_blocks_has_two_of_them_on_the_device_at_most(llama_8b: ModelLayout) -> None:
    block = sum(t.memory_bytes for t in llama_8b.largest_block)
    found = on(llama_8b, gpu(24), wanda=Wanda())
    assert block < found.device_peak_bytes < 10 * block < llama_8b.memory_bytes


def test_the_reason_names_a_way_out(llama_8b: ModelLayout) -> None:
    short = on(llama_8b, gpu(12)).reason
    assert "needs 1" in short and "it fits at 8 bits (int8) with 1 x 4,096 tokens" in short
    batch = on(llama_8b, gpu(24, latency_batch_size=64)).reason
    assert "it fits at" in batch or "it fits with 1 x 4,096 tokens" in batch
    assert "with 1 x" in on(llama_8b, gpu(7.5)).reason
    assert "smaller model" in on(llama_8b, gpu(1)).reason
    assert on(llama_8b, gpu(80)).reason == ""
    assert "smaller batches" in on(llama_8b, gpu(80), lora=Lora(tokens_per_batch=200_000)).reason
    assert on(llama_8b, gpu(80), lora=Lora(tokens_per_batch=200_000)).reason.startswith("lora: ")


def test_main_memory_counts_where_the_device_is(llama_8b: ModelLayout) -> None:
    here = dataclasses.replace(MACHINE, host_limit=16 * GB)
    assert on(llama_8b, gpu(80), MACHINE).fits
    assert "main memory" in on(llama_8b, gpu(80), here).reason


def test_the_limit_is_sharp(llama_8b: ModelLayout) -> None:
    needed = on(llama_8b, gpu(80)).last.serving_bytes
    assert on(llama_8b, gpu((needed / HEADROOM + 2) / GB)).fits
    assert not on(llama_8b, gpu((needed / HEADROOM - 2) / GB)).fits


def test_hardware_of_unknown_size_is_refused(llama_8b: ModelLayout) -> None:
    with pytest.raises(UserError, match=r"set hardware\.memory_limit_bytes"):
        on(llama_8b, dataclasses.replace(gpu(1), memory_limit_bytes=None, devices=1))


def test_a_quantized_cache_is_smaller_but_for_its_newest_tokens(llama_8b: ModelLayout) -> None:
    whole, narrow, waiting = (
        on(dataclasses.replace(llama_8b, **changes), gpu(80)).last.cache_bytes
        for changes in ({}, {"cache_bits": 4.5}, {"cache_bits": 4.5, "cache_residual": 128})
    )
    assert whole == 4096 * 32 * 2 * 1024 * 2
    assert narrow == pytest.approx(whole * 4.5 / 16)
    assert waiting == pytest.approx(narrow * 3968 / 4096 + whole * 128 / 4096)


def test_time_is_unknown_without_the_devices_speed(llama_8b: ModelLayout) -> None:
    unknown = dataclasses.replace(MACHINE, flops=None)
    assert on(llama_8b, gpu(80), unknown, wanda=Wanda()).seconds is None
    assert on(llama_8b, gpu(80), unknown, rtn=RTN()).seconds is not None
    slow = dataclasses.replace(MACHINE, flops=MACHINE.flops / 100)  # type: ignore[operator]
    assert on(llama_8b, gpu(80), slow, wanda=Wanda()).seconds > on(llama_8b, gpu(80), wanda=Wanda()).seconds  # type: ignore[operator]


def test_this_machine_is_measured() -> None:
    machine = measure_machine(Hardware("cpu"), "float32")
    assert machine.flops and 1e8 < machine.flops < 1e14
    assert 1e8 < machine.traffic < 1e12
    assert machine.process_bytes > 10**8
    assert machine.host_limit and machine.host_limit > machine.process_bytes
    assert measure_machine(gpu(24, tflops=312.0), "bfloat16").flops == 312e12


def test_work_that_follows_needs_the_larger_memory_and_the_sum_of_the_time() -> None:
    first, second = StageCost(flops=1, host_bytes=10, device_bytes=1), StageCost(flops=2, host_bytes=5, device_bytes=3)
    assert first.then(second) == StageCost(flops=3, host_bytes=10, device_bytes=3)
    assert first + second == StageCost(flops=3, host_bytes=15, device_bytes=4)
    assert first.times(3) == StageCost(flops=3, host_bytes=10, device_bytes=1)


def test_calibration_counts_as_it_was_tokenised(llama_8b: ModelLayout) -> None:
    at_most = StageCost.calibrated(llama_8b, Calibration(samples=10, max_length=100))
    tokens = 10 * 100
    assert at_most.flops == pytest.approx(2 * 2 * tokens * llama_8b.linear_parameters, rel=0.05)
    found = CountedCalibration(samples=10, max_length=100, tokens=500, shapes=3, batch_tokens=100)
    assert StageCost.calibrated(llama_8b, found).flops == pytest.approx(at_most.flops / 2, rel=0.05)
    # as many bytes as the square of the widest inputs of a block in single precision
    assert StageCost.hessians(llama_8b, found).device_bytes > 4 * (6 * 4096**2 + 14336**2)
