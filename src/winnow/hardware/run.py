"""Defines `Run`: the folder, device, limits and calibration data that a stage or a probe uses besides the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from winnow.core.errors import check_seed
from winnow.core.types import Calibration


@dataclass(frozen=True)
class Run:
    """What a stage or a probe uses besides the model."""

    folder: Path  # for scratch files and checkpoints; it exists
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"  # compute dtype; auto: the one that the device computes fastest
    calibration: Calibration = field(default_factory=lambda: Calibration())
    base: str | None = None  # folder or hub id of the first stage's input model
    devices: int = 1  # training processes, one a device
    memory_limit_bytes: int | None = None  # for each device; None: all of its memory
    parallel: str = "auto"  # ddp, fsdp, or auto, which uses fsdp if one device cannot hold the model
    tflops: float | None = None  # of one device, for time forecasts; None: the processor is measured
    carbon_g_per_kwh: float = 475.0
    cache: Path | None = None  # for files that outlive a run: teacher targets, batch sizes; None: the run's own folder
    stage_cache_bytes: int = 0  # share of `cache` for artifacts of pipeline prefixes; 0: they are not cached
    bars: bool = True  # whether to draw progress bars in a terminal
    # logs a point of the training curves
    curve: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def compute_dtype(self) -> str:
        """The compute dtype, by torch's name."""
        from winnow.hardware.compute import fastest_dtype

        return fastest_dtype(self.device) if self.dtype == "auto" else self.dtype
