"""The meters on a CUDA device."""

from __future__ import annotations

from pathlib import Path

from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.runtime.meters import Meters


def test_the_counter_of_energy_is_read(tiny: Path, tmp_path: Path) -> None:
    hardware = Hardware("gpu", device="cuda", prompt_tokens=8, output_tokens=8, energy_tokens=2000, seconds=0)
    lm = LM(tiny)
    lm.model.to("cuda")
    figures = Meters(hardware)(lm, Run(tmp_path, device="cuda"))
    assert figures.sources["energy_wh_per_1k_tokens"] == "counter"
    assert figures["peak_memory_bytes"] >= figures["weights_memory_bytes"]
