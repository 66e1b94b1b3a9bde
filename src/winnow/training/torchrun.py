"""Runs a pipeline's training stage on several devices in a `torchrun` child, which exchanges models with the pipeline on disk.

    python compress.py method=[wanda,lora,rtn] hardware=l40s_x2

The pipeline saves the current model to the run's folder, the child writes an artifact next to it, and the pipeline continues with
that artifact. The child receives the stage's fields as overrides, and no launcher variables from the parent's environment: a
`torchrun` inside a `torchrun`, or inside a Slurm step, would otherwise read the outer ranks as its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from winnow.core import grammar
from winnow.core.errors import RankLost, UserError
from winnow.core.process import end_with_parent
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.training.dist_env import DEVICE_HELD, TRAINING, HasSlot, under_torchrun

logger = logging.getLogger(__name__)

TRAIN = Path(__file__).resolve().parents[3] / "train.py"
ELASTIC = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "PET_", "TORCH_NCCL_ASYNC")  # prefixes
RANKS = ("RANK", "WORLD_SIZE", "NODE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "SLURM_LOCALID")
_PIPELINE_KEYS = (  # entries of a manifest that the pipeline writes itself
    "base",
    "stages",
    "sizes",
    "versions",
    "sha256",
    "files",
    "runtimes",
    "plain_text",
)
_MAX_LINES = 400


def needs_torchrun(stage: HasSlot, run: Run) -> bool:
    """Returns whether the stage is a training on several devices that does not run under `torchrun` yet."""
    return run.devices > 1 and not under_torchrun() and stage.slot in TRAINING and hasattr(stage, "steps")


def run_under_torchrun(name: str, stage: HasSlot, lm: LM, run: Run) -> tuple[LM, dict[str, Any]]:
    """Returns the model and the notes of `stage(lm, run)`, computed by one process per device.

    Raises:
        UserError: the training refused its input; the message is the training's own.
        RankLost: one of its processes died; the message says which and how.
        SystemExit: code 143, after the training has saved a checkpoint, when this process received a stop signal.
    """
    folder = run.folder / f"spread-{name}"
    start = _saved_model_path(lm, folder / "start")
    output = folder / "artifact"
    with _forwarded_signals() as forwarder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.devices}"),
            *(str(TRAIN), *overrides(name, stage, start, lm, run, output)),
        ]
        logger.info(f"{name}: torchrun on {run.devices} devices")
        code, lines = _run_child(command, run, forwarder)
    if code:
        raise _failure(name, code, lines, forwarder.received)
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    (output / "manifest.json").unlink()
    record = manifest["stages"][-1]
    lm.manifest |= {k: v for k, v in manifest.items() if k not in _PIPELINE_KEYS}
    notes = {k: v for k, v in record.items() if k not in ("method", "slot", "knobs", "seed", "seconds")}
    return lm.with_files(output), {**notes, "devices": run.devices}


def _saved_model_path(lm: LM, folder: Path) -> str:
    """Returns the path of the current model: its source if no stage has changed it, otherwise `folder`, where it is saved."""
    from winnow.model.save import save

    if lm.path is not None:
        return str(Path(lm.path).resolve()) if Path(lm.path).is_dir() else lm.path
    shutil.rmtree(folder, ignore_errors=True)
    return str(Path(str(save(lm, folder).path)).resolve())


def overrides(name: str, stage: HasSlot, start: str, lm: LM, run: Run, output: Path) -> list[str]:
    """Returns the arguments of `train.py` that run only this stage with the settings of this run."""
    loading = {k: v for k, v in dataclasses.asdict(lm.loading).items() if k != "device"}
    fields: dict[str, Any] = dataclasses.asdict(stage)  # type: ignore[call-overload]
    outputs = run.cache.parent if run.cache is not None else run.folder / "outputs"
    settings: dict[str, Any] = {
        "model.path": start,
        "model.name": lm.name,
        **{f"model.{k}": v for k, v in loading.items()},
        "base": run.base,
        **{f"method.{name}.{k}": v for k, v in fields.items()},
        **{f"calibration.{f.name}": getattr(run.calibration, f.name) for f in dataclasses.fields(run.calibration)},
        "seed": run.seed,
        "hardware.device": run.device,
        "hardware.dtype": run.compute_dtype,
        "hardware.devices": run.devices,
        "hardware.parallel": run.parallel,
        "hardware.memory_limit_bytes": run.memory_limit_bytes,
        "hardware.carbon_g_per_kwh": run.carbon_g_per_kwh,
        "hardware.tflops": run.tflops,
        "output": str(output.resolve()),
        "outputs": str(outputs.resolve()),
        "wandb.mode": "disabled",  # its curves arrive as log lines
    }
    return [
        "model=local",
        f"method=[{name}]",
        "hardware=cpu",
        *(f"{k}={grammar.quoted(v)}" for k, v in settings.items()),
    ]


def child_environment(run: Run) -> dict[str, str]:
    """Returns this process's environment without the variables of other launchers about their ranks."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(ELASTIC) and k not in RANKS}
    if run.device == "cpu":
        from winnow.hardware.inventory import available_cores

        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // run.devices))
    else:
        variables.setdefault("OMP_NUM_THREADS", "1")
    return {**variables, DEVICE_HELD: "1"}


@dataclasses.dataclass
class _SignalForwarder:
    """A signal handler that stores the received signal and sends it on to the child."""

    child: subprocess.Popen[str] | None = None
    received: int = 0  # the last signal; 0: none

    def __call__(self, number: int, frame: Any) -> None:
        self.received = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[_SignalForwarder]:
    """Forwards SIGINT, SIGTERM and SIGUSR1 to the child inside the context."""
    forwarder = _SignalForwarder()
    previous_handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            previous_handlers[number] = signal.signal(number, forwarder)
    try:
        yield forwarder
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _run_child(command: list[str], run: Run, forwarder: _SignalForwarder) -> tuple[int, list[str]]:
    """Runs the child and logs its output; returns its exit code and its last lines."""
    lines: deque[str] = deque(maxlen=_MAX_LINES)
    # a process group of its own, so that Ctrl-C in a terminal reaches it only once, through the forwarder
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=Path.cwd(),
        env=child_environment(run),
        process_group=0,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # noqa: PLW1509  (one system call)
    ) as child:
        forwarder.child = child
        try:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                if line.strip() and not line.startswith("artifact: "):  # the child's artifact is not the pipeline's
                    logger.info(line.rstrip("\n"))
            return child.wait(), list(lines)
        except BaseException:
            child.terminate()  # torchrun then ends its workers within 30 s
            raise


def _failure(name: str, code: int, lines: list[str], received: int) -> BaseException:
    """Returns the exception to raise, from torchrun's report, which names the first failed process and its exit code."""
    if received == signal.SIGINT:
        return KeyboardInterrupt()
    if received:
        return SystemExit(128 + signal.SIGTERM)
    text = "\n".join(lines)
    root = text.rpartition("Root Cause")[2]
    rank, exit_code = (re.search(rf"{word}\s*:\s*(-?\d+)", root) for word in ("rank", "exitcode"))
    messages = [line.partition("train.py: ")[2] for line in lines if line.startswith("train.py: ")]
    if rank is None or exit_code is None:
        return RankLost(f"{name}: torchrun ended with code {code}: {lines[-1] if lines else 'it said nothing'}")
    number = int(exit_code.group(1))
    if number == 2 and messages:
        return UserError(messages[0])
    how = f"ended with code {number}"
    if number < 0:
        how = f"was killed by {signal.Signals(-number).name}"
        how += " (often the kernel's, out of memory)" if number == -signal.SIGKILL else ""
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?\w*(\.\w+)*(Error|Exception|Lost)\b.*: ", line)]
    return RankLost(
        f"{name}: rank {rank.group(1)} of the training {how}, the others were ended"
        + (f"; {errors[0]}" if errors and number > 0 else "")
    )
