"""Reads the configurations of `compress.py`, `train.py` and `evaluate.py`, which trials share, into frozen values."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from winnow import build
from winnow.benchmark.protocol import Benchmark
from winnow.core.scalars import check_scalars
from winnow.core.types import Calibration
from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.method.knobs import Stage
from winnow.model.lm import LM

logger = logging.getLogger(__name__)

METRICS = "metrics.json"  # file in the output of an evaluation


@dataclass(frozen=True)
class RunSettings:
    """The settings that a `Run` is started with.

    Attributes:
        base: folder or hub id of the first stage's input model; None is the model of the command.
        cache: folder for files that outlive a run.
        stage_cache_bytes: share of `cache` for artifacts of pipeline prefixes.
        in_search: whether a search runs the command; the search itself then warns of a slow compute dtype.
    """

    hardware: Hardware
    calibration: Calibration
    seed: int
    base: str | None
    cache: Path
    stage_cache_bytes: int
    in_search: bool

    def start(self, folder: Path) -> Run:
        """Creates the folder and returns the run that works in it."""
        from winnow.hardware.compute import slow_dtype_warning

        folder.mkdir(parents=True, exist_ok=True)
        hardware = self.hardware
        warning = "" if self.in_search else slow_dtype_warning(hardware.compute_dtype, hardware.device)
        if warning:
            logger.info(f"hardware.dtype={hardware.dtype}: {warning}")
        return Run(
            folder=folder,
            seed=self.seed,
            device=hardware.device,
            dtype=hardware.compute_dtype,
            calibration=self.calibration,
            base=self.base,
            devices=hardware.devices,
            parallel=hardware.parallel,
            tflops=hardware.tflops,
            memory_limit_bytes=hardware.memory_limit_bytes,
            carbon_g_per_kwh=hardware.carbon_g_per_kwh,
            cache=self.cache,
            stage_cache_bytes=self.stage_cache_bytes,
        )


@dataclass(frozen=True)
class Compression:
    """What `compress.py` and `train.py` do: the stages to apply to a model, and where the artifact goes.

    Attributes:
        scratch: folder for checkpoints and intermediate files, which is the same for the same command.
        curves: arguments of `winnow.report.curves.Curves` that the configuration decides.
    """

    lm: LM
    stages: Mapping[str, Stage]
    run: RunSettings
    output: Path
    scratch: Path
    curves: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate.py` does: the model to measure and score, and where the metrics go."""

    lm: LM
    benchmark: Benchmark
    benchmark_name: str
    run: RunSettings
    output: Path


@dataclass(frozen=True)
class DryRun:
    """What a dry run forecasts: a model that is known by its configuration alone, and the stages to apply to it."""

    lm: LM
    stages: Mapping[str, Stage]
    hardware: Hardware
    calibration: Calibration
    seed: int


def compression(cfg: DictConfig, command: str = "compress") -> Compression:
    """Reads the configuration of `compress.py` or, by its name as `command`, of `train.py`.

    Raises:
        UserError: a setting is not valid, or the model does not exist.
    """
    hardware, stages, lm = build.hardware(cfg), build.stages(cfg), build.model(cfg)
    output = _output(cfg, command, lm, stages)
    settings = build.plain(cfg)
    config = {"model": settings["model"].get("name"), **{k: settings.get(k) for k in ("method", "calibration", "seed")}}
    curves = {**settings["wandb"], "folder": Path(cfg.outputs) / "wandb", "config": config}
    return Compression(lm, stages, run_settings(cfg, hardware), output, _scratch(cfg, output), curves)


def evaluation(cfg: DictConfig) -> Evaluation:
    """Reads the configuration of `evaluate.py`.

    A GGUF file is dequantized to a base model, as in `compress.py`; `hardware.runtime=llama_cpp` serves the file itself.

    Raises:
        UserError: a setting is not valid, or the model does not exist.
    """
    hardware = build.hardware(cfg)
    lm = build.model(cfg, dequantize=hardware.runtime != "llama_cpp")
    benchmark, name = build.benchmark(cfg), str(cfg.benchmark.name)
    return Evaluation(lm, benchmark, name, run_settings(cfg, hardware), _output(cfg, "evaluate", lm, {name: benchmark}))


def dry_run(cfg: DictConfig, with_stages: bool = True) -> DryRun:
    """Reads the configuration of a dry run; needs no weights.

    Raises:
        UserError: a setting is not valid, or the model does not exist.
    """
    from winnow.data.corpus import check_source

    stages = build.stages(cfg) if with_stages else {}
    hardware, lm, calibration = build.hardware(cfg), build.model(cfg, weights=False), build.calibration(cfg)
    check_source(calibration)
    return DryRun(lm, stages, hardware, calibration, cfg.seed)


def run_settings(cfg: DictConfig, hardware: Hardware) -> RunSettings:
    """Reads what every run needs besides the hardware.

    Raises:
        UserError: the seed or the calibration is not valid.
    """
    from winnow.data.corpus import check_source

    check_scalars(Run, {"seed": cfg.seed})
    calibration = build.calibration(cfg)
    check_source(calibration)
    return RunSettings(
        hardware=hardware,
        calibration=calibration,
        seed=cfg.seed,
        base=cfg.get("base"),
        cache=Path(cfg.outputs) / "cache",
        stage_cache_bytes=int(cfg.get("stage_cache_gb", 0) * 1e9),
        in_search="study" in cfg,
    )


def _output(cfg: DictConfig, command: str, lm: LM, parts: Mapping[str, Any]) -> Path:
    """Returns the folder for results: `cfg.output`, or a name under `cfg.outputs` derived from the settings."""
    if cfg.output:
        return Path(cfg.output)
    ignored = ("outputs", "output", "dry_run", "wandb")
    relevant = json.dumps({k: v for k, v in build.plain(cfg).items() if k not in ignored}, sort_keys=True)
    digest = hashlib.sha256(relevant.encode()).hexdigest()[:8]
    return Path(cfg.outputs) / command / "-".join([lm.name, *parts, digest])


def _scratch(cfg: DictConfig, output: Path) -> Path:
    digest = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]
    return Path(cfg.outputs) / "scratch" / f"{output.name}-{digest}"
