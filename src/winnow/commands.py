"""Implements `compress.py`, `train.py` and `evaluate.py` as functions of their settings, which trials also run."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from winnow.benchmark.protocol import Benchmark
from winnow.build.command_settings import METRICS, Compression, Evaluation
from winnow.core.errors import Stopped, UserError
from winnow.core.files import remove_empty
from winnow.core.muted import muted
from winnow.core.types import Figures
from winnow.hardware.lock import shared_device
from winnow.hardware.run import Run
from winnow.method.pipeline import compress as run_pipeline
from winnow.model.lm import LM
from winnow.training import dist_env

if TYPE_CHECKING:
    from winnow.benchmark.samples import Sample
    from winnow.report.curves import Curves
    from winnow.runtime import Served
    from winnow.runtime.in_turn import Base

logger = logging.getLogger(__name__)


def compress(settings: Compression) -> Path:
    """Applies the stages to the model; returns the folder of the artifact."""
    hardware, lm, stages = settings.run.hardware, settings.lm, settings.stages
    # weights stay in main memory; stages move one block at a time to the device
    lm.loading = dataclasses.replace(lm.loading, device="cpu")
    hardware.check()
    dist = dist_env.enter(hardware, stages)
    output, scratch = settings.output, settings.scratch
    curves = curves_of(settings)
    with _lock_scratch(scratch, output) if dist.is_rank_zero else muted():  # only rank 0 of a distributed training logs
        try:
            with _share_device(hardware.device, dist), curves if dist.is_rank_zero else contextlib.nullcontext():
                run = dataclasses.replace(settings.run.start(scratch), curve=curves.log)
                artifact = run_pipeline(lm, stages, run, output)
        except BaseException:
            # checkpoints of a training stay, so that the same command resumes from them
            if dist.is_rank_zero and not any(scratch.rglob("*.ckpt")):
                _remove(scratch)
            raise
        if not dist.is_rank_zero:
            sys.exit(0)  # rank 0 writes the artifact of all ranks
        _remove(scratch)
    assert artifact.path is not None
    return Path(artifact.path)


class EvaluationHooks(Protocol):
    """Hooks of a search between the parts of an evaluation; each may raise `Stopped` to end it.

    Attributes:
        scores_first: whether the benchmark runs before the hardware meters.
    """

    scores_first: bool

    def on_loaded(self, lm: LM, served: Served, run: Run) -> Figures:
        """Returns cheap figures once the model is loaded."""

    def base(self) -> Base | None:
        """Returns the base model if the model is to be measured in turn with it; called once the model is loaded."""

    def on_measured(self, figures: Figures) -> None:
        """Receives the cheap figures, and those of the hardware if they were measured."""

    def ordered(self, benchmark: Benchmark) -> Benchmark:
        """Returns the benchmark with its items in the order in which they are to be scored."""

    def on_round(self, samples: Sequence[Sample], items_left: int) -> None:
        """Receives the item outcomes so far after each round but the last."""


def evaluate(settings: Evaluation, hooks: EvaluationHooks | None = None) -> dict[str, Any]:
    """Measures and scores a model as it is on disk; writes `metrics.json` and the item outcomes, returns the metrics.

    If a hook stops the evaluation, `stopped` says why, and the figures are those measured before.
    """
    from winnow.core.files import atomic_folder
    from winnow.model import manifest
    from winnow.runtime import serving
    from winnow.runtime.check import check
    from winnow.runtime.meters import Meters

    hardware, lm, benchmark = settings.run.hardware, settings.lm, settings.benchmark
    hardware.check()
    figures, seconds = Figures(), dict[str, float]()
    stopped = None
    with atomic_folder(settings.output) as folder, contextlib.ExitStack() as opened:
        run = settings.run.start(folder)

        def measure() -> None:
            with _timed(seconds, "meters"):
                figures.merge(Meters(hardware, hooks.base() if hooks is not None else None)(lm, run, served))

        def score() -> None:
            if hooks is not None:
                hooks.on_measured(figures)
            with shared_device(hardware.device), _timed(seconds, "benchmark"):
                figures.merge(
                    benchmark(lm, run, served=served)
                    if hooks is None
                    else hooks.ordered(benchmark)(lm, run, hooks.on_round, served)
                )

        try:
            with shared_device(hardware.device):  # shared with other work; the meters wait for exclusive use
                with _timed(seconds, "load"):
                    served = opened.enter_context(serving(lm, hardware))
                with _timed(seconds, "check"):
                    check(lm, served)  # before anything expensive
                if hooks is not None:
                    with _timed(seconds, "divergence"):
                        figures.merge(hooks.on_loaded(lm, served, run))
            for part in (score, measure) if hooks is not None and hooks.scores_first else (measure, score):
                part()
        except Stopped as end:
            logger.info(f"stopped: {end}")
            stopped = end.to_json()
        metrics = {
            "model": {"name": lm.name, "path": lm.path, "sha256": lm.sha256()},
            "benchmark": settings.benchmark_name,
            "hardware": hardware.fingerprint(),
            "runtime": served.name,
            "runtime_mode": served.runtime_mode,
            "seed": settings.run.seed,
            "figures": dict(figures),
            "sources": figures.sources,
            "seconds": seconds,
            "versions": manifest.versions(),
            **({"stopped": stopped} if stopped else {}),
        }
        (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    logger.info(f"metrics: {settings.output / METRICS}")
    return metrics


@contextlib.contextmanager
def _lock_scratch(scratch: Path, output: Path) -> Iterator[None]:
    """Locks the scratch folder, because a second process with the same command would remove files of the first one.

    Raises:
        UserError: another process holds the lock.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output={output} is being made by another process with the same settings; wait for it, or set another output="
            ) from None
        yield
    finally:
        os.close(descriptor)


def curves_of(settings: Compression) -> Curves:
    """Returns the logger of training curves: one W&B run named after the output."""
    from winnow.report.curves import Curves

    return Curves(**settings.curves, name=settings.output.name, memory=settings.scratch / "wandb-id")


def _share_device(device: str, dist: dist_env.DistEnv) -> contextlib.AbstractContextManager[None]:
    """Takes the shared device once for all ranks: a measurement waiting for exclusive use would block a second request."""
    already_held = dist.local_rank > 0 or dist_env.DEVICE_HELD in os.environ
    return contextlib.nullcontext() if already_held else shared_device(device)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - started, 3)


def _remove(scratch: Path) -> None:
    """Removes a scratch folder, and also `scratch/` and the outputs folder if they are then empty."""
    shutil.rmtree(scratch, ignore_errors=True)
    remove_empty(scratch.parent, until=scratch.absolute().parents[2])
