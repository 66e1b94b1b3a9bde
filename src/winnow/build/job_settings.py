"""Reads the configuration of a search's job, a trial or the confirmation of one, into frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.benchmark.protocol import Benchmark
from winnow.build.command_settings import Compression, DryRun, Evaluation, compression, dry_run, evaluation
from winnow.core.errors import UserError
from winnow.core.targets import target_of
from winnow.core.types import Objective
from winnow.hardware.device import Hardware
from winnow.method.knobs import Stage
from winnow.model.lm import LM
from winnow.study.objectives import objectives

SCORE_HOLDOUT = "score_holdout"  # config key that makes a job the confirmation of a trial


@dataclass(frozen=True)
class TrialLimits:
    """Limits of a trial; None is no limit."""

    minutes: float | None = None
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Racing:
    """Settings that say when a trial is stopped early.

    Attributes:
        error_rate: probability, over a whole race, of stopping a trial that no rival matches; 0 switches racing off.
        hopeless_ratio: a trial is hopeless above this ratio of its divergence to that of a rival; 0 switches the check off.
        hopeless_floor: divergence in nats per token below which no trial is hopeless.
    """

    error_rate: float = 0.05
    hopeless_ratio: float = 4.0
    hopeless_floor: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 1:
            raise UserError(f"racing.error_rate={self.error_rate} is not a share; give 0.05, or 0 to score every item")
        for name in ("hopeless_ratio", "hopeless_floor"):
            if getattr(self, name) < 0:
                raise UserError(f"racing.{name}={getattr(self, name)} is negative; give 0 to switch it off")


@dataclass(frozen=True)
class JobSettings:
    """The settings of a job of a search: a trial, or the confirmation of one.

    Attributes:
        composed: the whole configuration as plain values, of which the job's steps build their objects in child processes.
        outputs: the folder that contains the folders of all studies.
        workers: number of jobs that the search runs at the same time.
    """

    composed: Mapping[str, Any]
    hardware: Hardware
    limits: TrialLimits
    outputs: Path
    workers: int
    is_confirmation: bool
    preloads: Sequence[str]


@dataclass(frozen=True)
class TrialEvaluation:
    """The settings of a trial's evaluation: those of `evaluate.py`, and what early stopping needs.

    Attributes:
        base: the base model of the search.
        memory_limit_bytes: limit of a trial's resident memory.
    """

    evaluation: Evaluation
    base: LM
    objectives: Sequence[Objective]
    racing: Racing
    memory_limit_bytes: float | None


def job_settings(cfg: DictConfig) -> JobSettings:
    """Reads the configuration of a job, in the process that runs it."""
    return JobSettings(
        composed=composed_values(cfg),
        hardware=build.hardware(cfg),
        limits=TrialLimits(**cfg.limits),
        outputs=Path(cfg.outputs),
        workers=cfg.workers,
        is_confirmation=bool(cfg.get(SCORE_HOLDOUT)),
        preloads=build.preloads(cfg),
    )


def trial_compression(composed: Mapping[str, Any], output: str) -> Compression:
    """Returns what the compression of a trial does."""
    # W&B gets the whole study (`winnow.report.tracking`), not the curves of each trial
    quiet = {**composed["wandb"], "mode": "disabled"}
    cfg = OmegaConf.create({**composed, "output": output, "wandb": quiet})
    return compression(cfg)


def trial_evaluation(composed: Mapping[str, Any], artifact: str, output: str) -> TrialEvaluation:
    """Returns what the evaluation of a trial's artifact does."""
    cfg = OmegaConf.create(dict(composed))
    evaluated = evaluation(_of_artifact(composed, artifact, output))
    study_objectives = objectives(list(cfg.objectives), evaluated.benchmark.scores())
    return TrialEvaluation(evaluated, build.model(cfg), study_objectives, Racing(**cfg.racing), cfg.limits.memory_bytes)


def confirmation(composed: Mapping[str, Any], artifact: str, output: str) -> Evaluation:
    """Returns what the confirmation of a trial does: scoring its artifact on the held-out items."""
    return evaluation(_of_artifact(_scoring_holdout(composed), artifact, output))


def holdout_benchmark(composed: Mapping[str, Any]) -> Benchmark:
    """Returns the benchmark whose items are those that confirmations score."""
    return build.benchmark(OmegaConf.create(_scoring_holdout(composed)))


def _scoring_holdout(composed: Mapping[str, Any]) -> dict[str, Any]:
    return {**composed, "benchmark": {**composed["benchmark"], "score_holdout": True}}


def _of_artifact(composed: Mapping[str, Any], artifact: str, output: str) -> DictConfig:
    """Returns the configuration of `evaluate.py` with the artifact in place of the base model."""
    model = {**composed["model"], "_target_": "winnow.model.pretrained.pretrained", "path": artifact}
    return OmegaConf.create({**composed, "model": model, "output": output})


def forecast_settings(composed: Mapping[str, Any]) -> tuple[DryRun, dict[str, type[Stage]]]:
    """Returns what a search forecasts, without the stages, and the class of each method of its space by name."""
    cfg = OmegaConf.create(dict(composed))
    classes = {name: target_of(node["_target_"]) for name, node in build.methods(cfg).items()}
    return dry_run(cfg, with_stages=False), classes


def composed_values(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configuration without Hydra's own part, as plain values."""
    composed: dict[str, Any] = build.plain(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    return composed
