"""Energy of a piece of work in Wh and its CO2, each with where the figure comes from.

`counter`: hardware counters only, NVML's for the GPUs, RAPL's (through codecarbon) for the processor. `estimated`: codecarbon's
power model, with the processor's rated power times the share of it that this process and its children used, and a fixed
power for the memory modules. An energy model is not a meter, and the label says so. Nothing is ever sent anywhere.

Cost: codecarbon finds out what the machine is in 1.6 s, 1 s of which py-cpuinfo sleeps to count clock ticks. That is done once a
process and inherited by forks, so a fork server that imports `winnow.hardware.preload` meters in its children for some 10 ms.

    with EnergyMeter() as energy:
        work()
    print(energy.wh, energy.source)
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from winnow.hardware.device import WORLD_AVERAGE_G_PER_KWH, visible_gpus
from winnow.types import MissingExtra

_COUNTERS = ("intel_rapl", "windows_emi")  # codecarbon's modes that read counters; AMD's processors have RAPL too
_J_PER_WH = 3600.0


@dataclass
class Energy:
    """What a metered piece of work took; `source` is `counter`, `estimated`, or `none` where nothing was metered."""

    wh: float = 0.0
    co2_g: float = 0.0
    source: str = "none"

    def record(self) -> dict[str, Any]:
        return {"energy_wh": self.wh, "co2_g": self.co2_g, "energy_source": self.source}


class EnergyMeter:
    """Context manager around the work to meter; the `Energy` that it gives is filled in when the work is over.

    Args:
        carbon_g_per_kwh: grams of CO2 equivalent per kWh.
        required: without codecarbon, raise instead of giving 0 from source `none`.
        device: `cuda`: by the counters of the GPUs alone, if they have any; `cpu`: without the GPUs of the machine;
            None: everything that codecarbon sees, for work that may use any of it.

    Raises:
        MissingExtra: on entering, if `required` and nothing can meter.
    """

    def __init__(
        self,
        carbon_g_per_kwh: float = WORLD_AVERAGE_G_PER_KWH,
        required: bool = False,
        device: str | None = None,
    ) -> None:
        self.carbon_g_per_kwh = carbon_g_per_kwh
        self.required = required
        self.device = device
        self.energy = Energy()
        self._tracker: Any = None
        self._gpus: list[int] | None = None

    def __enter__(self) -> Energy:
        if self.device == "cuda":
            self._gpus = gpu_counters_mj()
            if self._gpus is not None:
                return self.energy
        try:
            detect()
            self._tracker = _tracker(self.carbon_g_per_kwh)
        except ImportError:
            if self.required:
                raise MissingExtra("codecarbon", "energy") from None
            return self.energy
        self._tracker.start_task("work")
        return self.energy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gpus is not None:
            now = gpu_counters_mj()
            if now is not None:
                spent_mj = sum(after - before for before, after in zip(self._gpus, now, strict=True))
                self._fill(spent_mj / 1000 / _J_PER_WH, "counter")
        elif self._tracker is not None:
            data = self._tracker.stop_task("work")
            if data is not None:
                self._fill(*_read(self._tracker, data, self.device))
        if self.required and error is None and self.energy.source == "none":
            raise RuntimeError("the energy meter was started and read nothing")

    def counted(self) -> bool:
        """Whether what meters has had news since the work began: NVML's counters stand still between two updates."""
        return self._gpus is None or gpu_counters_mj() != self._gpus

    def _fill(self, wh: float, source: str) -> None:
        self.energy.wh = wh
        self.energy.co2_g = wh / 1000 * self.carbon_g_per_kwh
        self.energy.source = source


def prepare(device: str) -> None:
    """Does what the first meter of a process would take seconds for, before the work begins."""
    if device != "cuda" or gpu_counters_mj() is None:
        with contextlib.suppress(ImportError):
            detect()


@functools.cache
def detect() -> None:
    """Lets codecarbon find out what the machine is; it keeps that for the process and for those forked from it.

    Raises:
        ImportError: codecarbon is not installed.
    """
    import codecarbon.core.emissions  # noqa: F401  (imports pandas, which start_task would otherwise wait for)

    _tracker(WORLD_AVERAGE_G_PER_KWH).get_detected_hardware()


def _tracker(carbon_g_per_kwh: float) -> Any:
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    # given one by one, so that a user's .codecarbon.config for other work cannot make this one send or write anything
    return OfflineEmissionsTracker(
        country_iso_code="USA",  # it must be named; the intensity below is what counts
        force_carbon_intensity_g_co2e_kwh=carbon_g_per_kwh,
        output_methods=[],
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        log_level="critical",
        allow_multiple_runs=True,
        tracking_mode="process",
        rapl_include_dram=True,
    )


def _read(tracker: Any, data: Any, device: str | None) -> tuple[float, str]:
    """Wh and their source, from codecarbon's record of a task, in kWh.

    Where counters cover what was used, only they count. codecarbon's memory model, some 10 W at any load, would make up
    much of a figure that says `counter`.
    """
    processors = [part for part in tracker._hardware if type(part).__name__ == "CPU"]
    counted = bool(processors) and all(getattr(part, "_mode", "") in _COUNTERS for part in processors)
    if device == "cpu":
        kwh = data.cpu_energy if counted else data.cpu_energy + data.ram_energy
        return 1000 * kwh, "counter" if counted else "estimated"
    has_gpus = any(type(part).__name__ == "GPU" for part in tracker._hardware)
    if counted and (not has_gpus or gpu_counters_mj() is not None):
        return 1000 * (data.cpu_energy + data.gpu_energy), "counter"
    return 1000 * data.energy_consumed, "estimated"


def gpu_counters_mj() -> list[int] | None:
    """The energy in mJ that each visible GPU has used since its driver was loaded (Volta and later).

    None where there is no GPU, or one without a counter. It is the whole board's, whoever uses it.
    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption.
    """
    try:
        import pynvml
    except ImportError:
        return None
    gpus = visible_gpus()
    if not gpus:
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
