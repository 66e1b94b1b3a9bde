"""What a stage or a probe may use besides the model: a folder, a device with its limits, and data to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from winnow.core.errors import check_seed
from winnow.core.types import Calibration


@dataclass(frozen=True)
class Run:
    """What a stage or a probe may use besides the model."""

    folder: Path  # scratch space and checkpoints; exists
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"  # that is computed in; auto: what the device computes fastest
    log: Callable[[str], None] = print
    calibration: Calibration = field(default_factory=lambda: Calibration())
    base: str | None = None  # the folder or hub id of the model that the first stage was given
    devices: int = 1  # processes that a training is spread over, one a device
    memory_limit_bytes: int | None = None  # of each device; None: all that it has
    parallel: str = "auto"  # how devices share a training: ddp, fsdp, or auto, fsdp where one cannot hold the model
    tflops: float | None = None  # of one device, for forecasts of time; None: a processor is measured
    carbon_g_per_kwh: float = 475.0
    cache: Path | None = None  # what outlives a run: a teacher's targets, batch sizes; None: the run's own folder
    stage_cache_bytes: int = 0  # of `cache`, for what the first stages of pipelines made; 0: none of it is kept
    bars: bool = True  # whether to draw progress bars in a terminal
    curve: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None  # a point of a training's curves

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def compute_dtype(self) -> str:
        """The type that is computed in, by torch's name."""
        from winnow.hardware.compute import fastest

        return fastest(self.device) if self.dtype == "auto" else self.dtype
