"""A training inside a pipeline on several devices: `torchrun` as a child, which the pipeline meets on disk.

    python compress.py method=[wanda,lora,rtn] hardware=l40s_x2

The model as it is goes to the run's folder, the child makes an artifact of it beside that, and the pipeline goes on from there.
The child gets the stage's fields as overrides, nothing of the parent's processes: a `torchrun` inside a `torchrun`, or inside a
Slurm step, would otherwise take the outer one's ranks for its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from winnow.training.dist_env import HELD, TRAINING, HasSlot, under_torchrun

TRAIN = Path(__file__).resolve().parents[3] / "train.py"
ELASTIC = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "PET_", "TORCH_NCCL_ASYNC")  # prefixes
RANKS = ("RANK", "WORLD_SIZE", "NODE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "SLURM_LOCALID")
_OWN = (
    "base",
    "stages",
    "sizes",
    "versions",
    "sha256",
    "files",
    "runtimes",
    "plain_text",
)  # entries of a manifest that the pipeline writes itself
_KEPT_LINES = 400


def needs_torchrun(stage: HasSlot, run: Run) -> bool:
    """Whether the stage is a training that several devices share, and that is not being shared already."""
    return run.devices > 1 and not under_torchrun() and stage.slot in TRAINING and hasattr(stage, "steps")


def run_under_torchrun(name: str, stage: HasSlot, lm: LM, run: Run) -> LM:
    """What `stage(lm, run)` returns, made by one process a device; its record is in the manifest's `_notes`.

    Raises:
        UserError: the training refused what it was given, with its message.
        RankLost: one of its processes died; the message says which and how.
        SystemExit: 143, after the training has left a checkpoint, when this process was told to stop.
    """
    folder = run.folder / f"spread-{name}"
    start = _on_disk(lm, folder / "start")
    output = folder / "artifact"
    with _passing_signals() as passing:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.devices}"),
            *(str(TRAIN), *overrides(name, stage, start, lm, run, output)),
        ]
        run.log(f"{name}: torchrun on {run.devices} devices")
        code, lines = _watched(command, run, passing)
    if code:
        raise _failure(name, code, lines, passing.asked)
    made: dict[str, Any] = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    (output / "manifest.json").unlink()
    record = made["stages"][-1]
    lm.manifest |= {k: v for k, v in made.items() if k not in _OWN}
    lm.manifest["_notes"] = {k: v for k, v in record.items() if k not in ("method", "slot", "knobs", "seed", "seconds")}
    lm.manifest["_notes"]["devices"] = run.devices
    return lm.stored(output)


def _on_disk(lm: LM, folder: Path) -> str:
    """Where the model lies as it is now: where it came from, if no stage has changed it."""
    from winnow.model.save import save

    if lm.path is not None:
        return str(Path(lm.path).resolve()) if Path(lm.path).is_dir() else lm.path
    shutil.rmtree(folder, ignore_errors=True)
    return str(Path(str(save(lm, folder).path)).resolve())


def overrides(name: str, stage: HasSlot, start: str, lm: LM, run: Run, output: Path) -> list[str]:
    """The command line of `train.py` that runs this stage alone, as this run would."""
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
        "wandb.mode": "disabled",  # its curves come as lines
    }
    return [
        "model=local",
        f"method=[{name}]",
        "hardware=cpu",
        *(f"{k}={grammar.text_of(v)}" for k, v in settings.items()),
    ]


def environment(run: Run) -> dict[str, str]:
    """This process's, without what other launchers have put there about their own ranks."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ELASTIC) and k not in RANKS}
    if run.device == "cpu":
        from winnow.hardware.inventory import available_cores

        kept["OMP_NUM_THREADS"] = str(max(1, available_cores() // run.devices))
    else:
        kept.setdefault("OMP_NUM_THREADS", "1")
    return {**kept, HELD: "1"}


@dataclasses.dataclass
class _Passing:
    """The signals that this process has been sent, and the child that they are for."""

    child: subprocess.Popen[str] | None = None
    asked: int = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.asked = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


@contextlib.contextmanager
def _passing_signals() -> Iterator[_Passing]:
    """Meanwhile Ctrl-C and SIGTERM are the child's to answer."""
    passing = _Passing()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, passing)
    try:
        yield passing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watched(command: list[str], run: Run, passing: _Passing) -> tuple[int, list[str]]:
    """The child's exit code and its last lines; each goes to the log as it comes."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    # a group of its own, so that Ctrl-C in a terminal reaches it once, through here
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=Path.cwd(),
        env=environment(run),
        process_group=0,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # noqa: PLW1509  (one system call)
    ) as child:
        passing.child = child
        try:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                if line.strip() and not line.startswith("artifact: "):  # that one is not the pipeline's
                    run.log(line.rstrip("\n"))
            return child.wait(), list(lines)
        except BaseException:
            child.terminate()  # it ends its workers, within 30 s
            raise


def _failure(name: str, code: int, lines: list[str], asked: int) -> BaseException:
    """What to raise: torchrun's report names the process that failed first, and its exit code."""
    if asked == signal.SIGINT:
        return KeyboardInterrupt()
    if asked:
        return SystemExit(128 + signal.SIGTERM)
    text = "\n".join(lines)
    root = text.rpartition("Root Cause")[2]
    rank, exit_code = (re.search(rf"{word}\s*:\s*(-?\d+)", root) for word in ("rank", "exitcode"))
    told = [line.partition("train.py: ")[2] for line in lines if line.startswith("train.py: ")]
    if rank is None or exit_code is None:
        return RankLost(f"{name}: torchrun ended with code {code}: {lines[-1] if lines else 'it said nothing'}")
    number = int(exit_code.group(1))
    if number == 2 and told:
        return UserError(told[0])
    how = f"ended with code {number}"
    if number < 0:
        how = f"was killed by {signal.Signals(-number).name}"
        how += " (often the kernel's, out of memory)" if number == -signal.SIGKILL else ""
    error = [line for line in lines if re.match(r"(\[rank\d+\]: )?\w*(\.\w+)*(Error|Exception|Lost)\b.*: ", line)]
    return RankLost(
        f"{name}: rank {rank.group(1)} of the training {how}, the others were ended"
        + (f"; {error[0]}" if error and number > 0 else "")
    )
