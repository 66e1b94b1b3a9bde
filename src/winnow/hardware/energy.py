"""Energy of a piece of work in Wh and its CO2, each with where the figure comes from.

`counter`: a hardware counter (RAPL for the processor, NVML for the GPU), read by codecarbon. `estimated`: codecarbon's power model
from the processor's rated power and load; an energy model is not a meter, and the label says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from winnow.types import MissingExtra

WORLD_AVERAGE_G_PER_KWH = 475.0  # IEA 2019, codecarbon's own default for an unknown country


@dataclass
class Energy:
    """What a metered piece of work took; `source` is `counter`, `estimated`, or `none` where nothing was metered."""

    wh: float = 0.0
    co2_g: float = 0.0
    source: str = "none"

    def record(self) -> dict[str, Any]:
        return {"energy_wh": self.wh, "co2_g": self.co2_g, "energy_source": self.source}


class EnergyMeter:
    """Context manager around the work to meter. One at a time in a process: codecarbon's trackers do not nest.

    Without codecarbon the figures are 0 from source `none`; `required=True` makes that an error instead.
    """

    def __init__(self, carbon_g_per_kwh: float = WORLD_AVERAGE_G_PER_KWH, required: bool = False) -> None:
        self.carbon_g_per_kwh = carbon_g_per_kwh
        self.required = required
        self.energy = Energy()
        self._tracker: Any = None

    def __enter__(self) -> Energy:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            if self.required:
                raise MissingExtra("codecarbon", "energy") from None
            return self.energy
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self._tracker = OfflineEmissionsTracker(
            country_iso_code="USA",  # only names the run: the intensity below is what counts
            force_carbon_intensity_g_co2e_kwh=self.carbon_g_per_kwh,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
            tracking_mode="process",
            measure_power_secs=5,
        )
        self._tracker.start()
        return self.energy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is None:
            return
        self._tracker.stop()
        data = self._tracker.final_emissions_data
        self.energy.wh = 1000 * data.energy_consumed
        self.energy.co2_g = self.energy.wh / 1000 * self.carbon_g_per_kwh
        self.energy.source = _source(self._tracker)


def _source(tracker: Any) -> str:
    """`counter` if the processor and every GPU are read from hardware counters."""
    modes = [getattr(part, "_mode", None) for part in tracker._hardware if type(part).__name__ == "CPU"]
    from_counter = bool(modes) and all(mode in ("intel_rapl", "intel_power_gadget") for mode in modes)
    return "counter" if from_counter else "estimated"
