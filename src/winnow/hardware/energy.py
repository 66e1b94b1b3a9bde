"""Meters the energy of a piece of work in Wh, and its CO2, and labels each figure with its source.

`counter`: only hardware counters, NVML's for the GPUs and RAPL's (through codecarbon) for the processor. `estimated`: codecarbon's
power model, which multiplies the processor's rated power by the share of it that this process and its children used, and adds a
fixed power for the memory modules. A model is not a meter, and the label says so. Nothing is ever sent anywhere.

Cost: codecarbon detects the hardware in 1.6 s, 1 s of which py-cpuinfo sleeps to count clock ticks. This is done once a process
and inherited by forks: children of a fork server that imports `winnow.hardware.energy_preload` start metering in some 10 ms.

    with EnergyMeter() as energy:
        work()
    print(energy.wh, energy.source)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from winnow.core.libraries import is_installed, require
from winnow.hardware.device import WORLD_AVERAGE_G_PER_KWH
from winnow.hardware.inventory import Gpu, used_gpus

_COUNTERS = ("intel_rapl", "windows_emi")  # codecarbon's modes that read counters; AMD processors have RAPL too
_J_PER_WH = 3600.0


@dataclass
class Energy:
    """Energy and CO2 of a piece of work; `source` is `counter`, `estimated`, or `none` where nothing was metered."""

    wh: float = 0.0
    co2_g: float = 0.0
    source: str = "none"

    def record(self) -> dict[str, Any]:
        return {"energy_wh": self.wh, "co2_g": self.co2_g, "energy_source": self.source}


class EnergyMeter:
    """Meters work as a context manager; the `Energy` that it yields is filled in when the work ends or fails.

    Args:
        carbon_g_per_kwh: grams of CO2 equivalent per kWh.
        device, devices: those of `hardware` that the work runs on; other GPUs of the machine do not count.
        host: whether processor and memory count beside GPUs; if false, they count only where the GPUs have no counters.
        required: raise if codecarbon is missing, instead of yielding 0 with source `none`.

    Raises:
        MissingExtra: on entering, if `required` and nothing can meter.
    """

    def __init__(
        self,
        carbon_g_per_kwh: float = WORLD_AVERAGE_G_PER_KWH,
        device: str = "cpu",
        devices: int = 1,
        host: bool = True,
        required: bool = False,
    ) -> None:
        self.carbon_g_per_kwh = carbon_g_per_kwh
        self.device, self.devices = device, devices
        self.host = host
        self.required = required
        self.energy = Energy()
        self._tracker: Any = None
        self._counters: EnergyCounters | None = None

    def __enter__(self) -> Energy:
        self._counters = EnergyCounters.read(self.device, self.devices)
        if self._counters is not None and not self.host:
            return self.energy
        if self.required:
            require("codecarbon")
        elif not is_installed("codecarbon"):
            return self.energy
        detect()
        # If the GPUs have counters, codecarbon's figure for them is not used.
        gpus = used_gpus(self.device, self.devices) if self._counters is None else ()
        self._tracker = _tracker(self.carbon_g_per_kwh, [gpu.index for gpu in gpus if gpu.index is not None])
        self._tracker.start_task("work")
        return self.energy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parts: list[tuple[float, bool]] = []  # Wh, and whether a counter measured them
        if self._counters is not None and (spent_wh := self._counters.spent_wh()) is not None:
            parts.append((spent_wh, True))
        if self._tracker is not None and (data := self._tracker.stop_task("work")) is not None:
            parts.append(_host_energy(self._tracker, data))
            if self.device == "cuda" and self._counters is None:
                parts.append((1000 * data.gpu_energy, False))
        if parts:
            self.energy.wh = sum(wh for wh, _ in parts)
            self.energy.co2_g = self.energy.wh / 1000 * self.carbon_g_per_kwh
            self.energy.source = "counter" if all(is_counted for _, is_counted in parts) else "estimated"
        if self.required and error is None and self.energy.source == "none":
            raise RuntimeError("the energy meter was started and read nothing")

    def has_update(self) -> bool:
        """Returns whether the meter has new data since the work began; NVML's counters stand still between two updates."""
        return self._counters is None or self._counters.spent_wh() != 0


@dataclass(frozen=True)
class EnergyCounters:
    """A reading of the energy counters of some GPUs."""

    gpus: tuple[Gpu, ...]
    used_mj: tuple[int, ...]

    @classmethod
    def read(cls, device: str, devices: int, environment: Mapping[str, str] = os.environ) -> EnergyCounters | None:
        """Reads the counters of the GPUs that work on `device` and `devices` uses in this environment; None without counters."""
        try:
            import pynvml  # noqa: F401  (without it torch would list the GPUs and start CUDA)
        except ImportError:
            return None
        gpus = used_gpus(device, devices, environment)
        used_mj = gpu_counters_mj(gpus)
        return None if used_mj is None else cls(gpus, tuple(used_mj))

    def spent_wh(self) -> float | None:
        """Returns the energy used since the reading; None if the counters no longer answer."""
        now_mj = gpu_counters_mj(self.gpus)
        return None if now_mj is None else (sum(now_mj) - sum(self.used_mj)) / 1000 / _J_PER_WH


def prepare(device: str, devices: int) -> None:
    """Does the slow detection for the first meter of a process, before the work begins."""
    if EnergyCounters.read(device, devices) is None:
        with contextlib.suppress(ImportError):
            detect()


def estimated_wh(cpu_seconds: float, seconds: float) -> float:
    """Estimates the energy of processor and memory for unmetered work from its times, by codecarbon's power model.

    Raises:
        ImportError: codecarbon is not installed.
    """
    detect()
    tracker = _tracker(WORLD_AVERAGE_G_PER_KWH)
    tracker.start_task("none")
    tracker.stop_task("none")
    joules = 0.0
    for part in tracker._hardware:
        if type(part).__name__ == "CPU":
            joules += (part._tdp or 0.0) * cpu_seconds / part._cpu_count
        elif type(part).__name__ == "RAM":
            joules += part.total_power().W * seconds
    return joules / _J_PER_WH


@functools.cache
def detect() -> None:
    """Lets codecarbon detect the hardware; it keeps the result for this process and its forks.

    Raises:
        ImportError: codecarbon is not installed.
    """
    import codecarbon.core.emissions  # noqa: F401  (imports pandas before start_task needs it)

    _tracker(WORLD_AVERAGE_G_PER_KWH).get_detected_hardware()


def _tracker(carbon_g_per_kwh: float, gpus: Sequence[int] = ()) -> Any:
    """Returns a codecarbon tracker; `gpus` are NVML indices of the GPUs that count, and empty lets codecarbon find them."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    # Every option is set here, so that a user's .codecarbon.config cannot make this tracker send or write anything.
    return OfflineEmissionsTracker(
        country_iso_code="USA",  # required by codecarbon, but the intensity below is used
        force_carbon_intensity_g_co2e_kwh=carbon_g_per_kwh,
        output_methods=[],
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        log_level="critical",
        allow_multiple_runs=True,
        tracking_mode="process",
        rapl_include_dram=True,
        gpu_ids=list(gpus) or None,
    )


def _host_energy(tracker: Any, data: Any) -> tuple[float, bool]:
    """Returns the Wh of processor and memory from codecarbon's record of a task (kWh), and whether a counter measured them.

    Where counters measure the processor, only they count. codecarbon's memory model, some 10 W at any load, would make up much of
    a figure labelled `counter`.
    """
    processors = [part for part in tracker._hardware if type(part).__name__ == "CPU"]
    is_counted = bool(processors) and all(getattr(part, "_mode", "") in _COUNTERS for part in processors)
    return 1000 * (data.cpu_energy if is_counted else data.cpu_energy + data.ram_energy), is_counted


def gpu_counters_mj(gpus: Sequence[Gpu]) -> list[int] | None:
    """Returns the energy in mJ that each GPU has used since its driver was loaded (Volta and later).

    Returns None without a GPU, or if a GPU has no counter. The figure covers the whole board, whoever uses it.
    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption.
    """
    if not gpus:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
            return [int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
