"""Which GPUs of a machine count, by a stand-in for NVML; and that what fails has used what it used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from winnow.hardware import energy
from winnow.hardware.energy import EnergyMeter
from winnow.hardware.inventory import used_gpus

WH_MJ = 3_600_000


class Machine:
    """NVML of a machine with eight GPUs, the last of which is cut into two slices; GPU n uses n + 1 Wh at each `work`."""

    class NVMLError(Exception): ...

    def __init__(self) -> None:
        self.used_mj = [0] * 8
        self.slices = {7: ["MIG-1111", "MIG-2222"]}

    def work(self) -> None:
        self.used_mj = [used + (number + 1) * WH_MJ for number, used in enumerate(self.used_mj)]

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 8

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return "abcdefgh".index(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "H200"

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return handle if isinstance(handle, str) else f"GPU-{'abcdefgh'[handle]}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return type("Memory", (), {"total": 8})

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        if handle not in self.slices:
            raise self.NVMLError
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, place: int) -> str:
        if place >= len(self.slices[handle]):
            raise self.NVMLError
        return self.slices[handle][place]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.used_mj[handle]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setitem(sys.modules, "pynvml", found)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


@pytest.mark.parametrize(
    ("visible", "devices", "wh"),
    [
        (None, 1, 1),  # CUDA's first
        (None, 2, 1 + 2),
        ("3", 1, 4),  # CUDA calls it 0, NVML 3
        ("5,2,0", 2, 6 + 3),
        ("GPU-c,GPU-a", 1, 3),
        ("MIG-2222", 1, 8),  # NVML counts the whole board
        ("MIG-1111,MIG-2222", 2, 8),
        ("MIG-GPU-h/1/0", 1, 8),
        ("MIG-GPU-b/1/0", 1, 2),
    ],
)
def test_only_the_gpus_that_the_work_runs_on_are_metered(
    visible: str | None, devices: int, wh: float, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with EnergyMeter(100, "cuda", devices, host=False, required=True) as spent:
        machine.work()
    assert spent.wh == pytest.approx(wh) and spent.co2_g == pytest.approx(wh / 10) and spent.source == "counter"


class Tracker:
    """Stands in for codecarbon: processor and memory take 2 Wh, all GPUs of the machine 100."""

    def __init__(self, carbon_g_per_kwh: float, gpus: list[int], made: list[list[int]]) -> None:
        made.append(gpus)
        self._hardware = [type("CPU", (), {"_mode": "cpu_load"})()]

    def start_task(self, name: str) -> None: ...

    def stop_task(self, name: str) -> Any:
        return type("Data", (), {"cpu_energy": 0.0015, "ram_energy": 0.0005, "gpu_energy": 0.1})


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The GPUs that each tracker was told to watch."""
    made: list[list[int]] = []
    monkeypatch.setattr(energy, "detect", lambda: None)
    monkeypatch.setattr(energy, "_tracker", lambda carbon, gpus=(): Tracker(carbon, list(gpus), made))
    return made


@pytest.mark.parametrize(("device", "devices", "wh"), [("cuda", 1, 2 + 1), ("cuda", 8, 2 + 36), ("cpu", 1, 2)])
def test_a_stage_counts_its_processor_and_its_own_gpus(
    device: str, devices: int, wh: float, machine: Machine, trackers: list[list[int]]
) -> None:
    with EnergyMeter(100, device, devices) as spent:
        machine.work()
    assert spent.wh == pytest.approx(wh) and spent.source == "estimated"


def test_without_counters_the_model_is_told_nvmls_numbers_of_the_gpus(
    machine: Machine, trackers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> int:
        raise machine.NVMLError

    monkeypatch.setattr(machine, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-f,GPU-b,GPU-a")
    with EnergyMeter(100, "cuda", 2) as spent:
        pass
    assert trackers == [[5, 1]] and spent.wh == pytest.approx(102)


def test_what_fails_has_used_what_it_used(machine: Machine, trackers: list[list[int]]) -> None:
    meter = EnergyMeter(100, "cuda", 1)
    with pytest.raises(ValueError, match="half way"), meter as spent:
        machine.work()
        raise ValueError("half way")
    assert spent.wh == pytest.approx(3)


def test_the_gpus_of_another_process_are_known_by_its_environment(machine: Machine) -> None:
    names: Callable[..., list[str]] = lambda **env: [g.uuid for g in used_gpus("cuda", 1, env)]  # noqa: E731
    assert names(CUDA_VISIBLE_DEVICES="6") == ["GPU-g"] and names() == ["GPU-a"]
    assert used_gpus("cpu", 1) == ()


def test_an_estimate_grows_with_the_times() -> None:
    pytest.importorskip("codecarbon")
    idle, short, long = (energy.estimated_wh(*times) for times in ((0.0, 60.0), (60.0, 60.0), (120.0, 120.0)))
    assert 0 < idle < short and long == pytest.approx(2 * short)
