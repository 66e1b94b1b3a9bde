"""What `compress.py`, `train.py` and `evaluate.py` do, as functions of their configuration; a trial runs the same ones."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.benchmark.protocol import Benchmark
from winnow.core.errors import Stopped, UserError
from winnow.core.files import remove_empty
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


def compress(cfg: DictConfig, log: Callable[[str], None], command: str = "compress") -> Path:
    """Applies the stages of `cfg.method` to `cfg.model`; returns the folder of the artifact."""
    hardware = build.hardware(cfg)
    stages = build.stages(cfg)
    lm = build.model(cfg)
    # in main memory, whatever the device: stages bring to it what they work on, a block at a time
    lm.loading = dataclasses.replace(lm.loading, device="cpu")
    hardware.check()
    world = dist_env.enter(hardware, stages)
    if not world.is_rank_zero:  # of the processes of a training only the first speaks
        log = _silent
    output = build.output(cfg, command, lm, stages)
    scratch = build.scratch(cfg, output)
    curves = curves_of(cfg, output, scratch, log)
    with _alone(scratch, output) if world.is_rank_zero else contextlib.nullcontext():
        try:
            with _sharing(hardware.device, log, world), curves if world.is_rank_zero else contextlib.nullcontext():
                run = dataclasses.replace(build.run(cfg, scratch, log), curve=curves.log)
                artifact = run_pipeline(lm, stages, run, output)
        except BaseException:
            # a training's checkpoints stay, so that the same command goes on from them
            if world.is_rank_zero and not any(scratch.rglob("*.ckpt")):
                _remove(scratch)
            raise
        if not world.is_rank_zero:
            sys.exit(0)  # the first writes what they have all made
        _remove(scratch)
    assert artifact.path is not None
    return Path(artifact.path)


class Gates(Protocol):
    """What a search puts between the parts of an evaluation; each may raise `Stopped` to end it there.

    Attributes:
        scores_first: whether the hardware is of interest only in what has been scored to its end.
    """

    scores_first: bool

    def on_loaded(self, lm: LM, served: Served, run: Run) -> Figures:
        """Figures that cost little, once the model is open."""

    def base(self) -> Base | None:
        """The base model, if the model is to be measured in turn with it; asked for once the model is open."""

    def on_measured(self, figures: Figures) -> None:
        """Is shown them, and those of the hardware if they were measured."""

    def ordered(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark, its items in the order in which they are to be put."""

    def on_round(self, samples: Sequence[Sample], left: int) -> None:
        """Is shown the items' outcomes so far, after each round but the last."""


def evaluate(cfg: DictConfig, log: Callable[[str], None], gates: Gates | None = None) -> dict[str, Any]:
    """Measures and scores `cfg.model` as it lies on disk; writes `metrics.json` and the items' outcomes, returns the metrics.

    A GGUF file is the base model that it was dequantized to, as `compress` takes it; `hardware.runtime=llama_cpp` has llama.cpp
    serve the file itself.

    Where a gate has stopped it, `stopped` says why, and the figures are those that were found before.
    """
    from winnow.core.files import whole_folder
    from winnow.model import manifest
    from winnow.runtime import serving
    from winnow.runtime.check import check
    from winnow.runtime.meters import Meters

    hardware = build.hardware(cfg)
    lm = build.model(cfg, dequantize=hardware.runtime != "llama_cpp")
    benchmark = build.benchmark(cfg)
    hardware.check()
    figures, seconds = Figures(), dict[str, float]()
    output = build.output(cfg, "evaluate", lm, {str(cfg.benchmark.name): benchmark})
    stopped = None
    with whole_folder(output) as folder, contextlib.ExitStack() as opened:
        run = build.run(cfg, folder, log)

        def measure() -> None:
            with _timed(seconds, "meters"):
                figures.merge(Meters(hardware, gates.base() if gates is not None else None)(lm, run, served))

        def score() -> None:
            if gates is not None:
                gates.on_measured(figures)
            with shared_device(hardware.device, log), _timed(seconds, "benchmark"):
                figures.merge(
                    benchmark(lm, run, served=served)
                    if gates is None
                    else gates.ordered(benchmark)(lm, run, gates.on_round, served)
                )

        try:
            with shared_device(
                hardware.device, log
            ):  # with other work; the meters wait until they have the device alone
                with _timed(seconds, "load"):
                    served = opened.enter_context(serving(lm, hardware, log))
                with _timed(seconds, "check"):
                    check(lm, served)  # before anything is paid for
                if gates is not None:
                    with _timed(seconds, "divergence"):
                        figures.merge(gates.on_loaded(lm, served, run))
            for part in (score, measure) if gates is not None and gates.scores_first else (measure, score):
                part()
        except Stopped as end:
            log(f"stopped: {end}")
            stopped = end.to_json()
        metrics = {
            "model": {"name": lm.name, "path": lm.path, "sha256": lm.sha256()},
            "benchmark": str(cfg.benchmark.name),
            "hardware": hardware.fingerprint(),
            "runtime": served.name,
            "runtime_mode": served.runtime_mode,
            "seed": cfg.seed,
            "figures": dict(figures),
            "sources": figures.sources,
            "seconds": seconds,
            "versions": manifest.versions(),
            **({"stopped": stopped} if stopped else {}),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    log(f"metrics: {output / 'metrics.json'}")
    return metrics


@contextlib.contextmanager
def _alone(scratch: Path, output: Path) -> Iterator[None]:
    """Holds the scratch folder: a second process with the same command would take files from under the first one.

    Raises:
        UserError: another process has it.
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


def curves_of(cfg: DictConfig, output: Path, scratch: Path, log: Callable[[str], None]) -> Curves:
    """Where the curves of the trainings go: into one run of W&B, named after the output."""
    from winnow.report.curves import Curves

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    shown = {"model": plain["model"].get("name"), **{k: plain.get(k) for k in ("method", "calibration", "seed")}}
    place = Path(cfg.outputs) / "wandb"
    return Curves(**plain["wandb"], folder=place, name=output.name, config=shown, memory=scratch / "wandb-id", say=log)


def _silent(line: str) -> None: ...


def _sharing(
    device: str, log: Callable[[str], None], world: dist_env.DistEnv
) -> contextlib.AbstractContextManager[None]:
    """Held once by all processes of a training: a measurement that waits for one would never let the next one in."""
    held = world.local_rank > 0 or dist_env.HELD in os.environ
    return contextlib.nullcontext() if held else shared_device(device, log)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - started, 3)


def _remove(scratch: Path) -> None:
    """Removes a scratch folder, and `scratch/` and the outputs' folder if nothing else lies in them."""
    shutil.rmtree(scratch, ignore_errors=True)
    remove_empty(scratch.parent, until=scratch.absolute().parents[2])
