"""Runs the steps of a job in child processes, with limits, and accounts for their time and energy.

Time and energy of a step count however the step ends. A step that fails is still metered by its own process, which outlives the
failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.build.job_settings import JobSettings
from winnow.core.errors import Reason, classify, describe
from winnow.core.files import write_json
from winnow.hardware.device import Hardware
from winnow.hardware.energy import EnergyCounters
from winnow.search import child

STOP = "stop"  # file that the search puts into a job's folder to cancel the job
LOOK_S = 1.0  # between checks for that file
SPENT = "spent.json"  # the energy of a job that was cancelled
ESTIMATE_S = 60.0  # limit for estimating the energy of a killed child
RIVALS = "rivals.json"  # in a trial's folder: the base model, its figures and those of the trials on the front


class Job:
    """A job of a search: steps in child processes, within the limits of a trial.

    Args:
        name: prefix of its log lines where several workers run.

    Attributes:
        seconds: seconds that each step took.
        energy: `wh` and `co2_g` of all steps so far. The meter of a killed step dies with it: the energy of its GPUs is then read
            from their counters, that of processor and memory is estimated from its times and reported as `unmetered_wh`.
        cancelled: callable that says whether the search has cancelled the job.
    """

    def __init__(self, settings: JobSettings, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.cancelled = folder, _CancelCheck(folder)
        self.seconds: dict[str, float] = {}
        self.energy: dict[str, float] = {}
        self._started = time.perf_counter()
        self._settings = settings
        self._environment = environment
        limits = settings.limits
        self._limits = child.Limits(60 * limits.minutes if limits.minutes else None, limits.memory_bytes)
        self._prefix: str | None = f"[{name}] " if settings.workers > 1 else ""
        if settings.is_confirmation:
            self._prefix = None  # the search itself reports a confirmation

    def step(self, name: str, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `function` ("module:name") in a child with the composed configuration and the arguments; returns its result.

        Raises:
            child.Failed: the step failed; carries the typed reason.
            child.Cancelled: the search has cancelled the job.
        """
        hardware = self._settings.hardware
        remaining_s = self._limits.seconds and max(1.0, self._limits.seconds - (time.perf_counter() - self._started))
        gpus = EnergyCounters.read(hardware.device, hardware.devices, {**os.environ, **self._environment})
        try:
            outcome = child.call(
                "winnow.search.job:metered",
                {
                    "function": function,
                    "hardware": hardware,
                    "arguments": {"composed": self._settings.composed, **arguments},
                },
                child.Limits(remaining_s, self._limits.memory_bytes),
                self.folder / "log.txt",
                self._prefix,
                self._environment,
                self.cancelled,
            )
        except child.Ended as ended:
            self.seconds[name] = round(ended.seconds, 3)
            estimated_wh = self._estimated_wh(ended)
            wh = estimated_wh + ((gpus.spent_wh() if gpus is not None else None) or 0.0)
            co2_g = wh / 1000 * hardware.carbon_g_per_kwh
            self._count({"wh": wh, "co2_g": co2_g, "unmetered_wh": estimated_wh})
            raise
        self.seconds[name] = outcome["seconds"]
        self._count(outcome["energy"])
        if outcome["failed"]:
            reason, message = outcome["failed"]
            raise child.Failed(Reason(reason), message)
        result: dict[str, Any] = outcome["result"]
        return result

    def all_seconds(self) -> dict[str, float]:
        """Returns the seconds of the steps, of their parts and of the whole job."""
        return self.seconds | {"total": round(time.perf_counter() - self._started, 3)}

    def write_spent(self) -> None:
        """Writes the energy so far into the folder for the search to read; the folder may be gone."""
        with contextlib.suppress(OSError):
            write_json(self.folder / SPENT, self.energy)

    def _count(self, energy: Mapping[str, float]) -> None:
        for name, used in energy.items():
            self.energy[name] = self.energy.get(name, 0.0) + used

    def _estimated_wh(self, ended: child.Ended) -> float:
        """Estimates the energy of processor and memory of a killed child, in another child that has the libraries loaded."""
        times = {"cpu_seconds": ended.cpu_seconds, "seconds": ended.seconds}
        try:
            estimate = child.call(
                "winnow.search.job:estimated", times, child.Limits(ESTIMATE_S), self.folder / "log.txt", self._prefix
            )
        except (child.Ended, OSError, EOFError):
            return 0.0  # codecarbon is not installed, or the fork server ended with the search
        return float(estimate["wh"])


def metered(function: str, hardware: Hardware, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs a step in the child; returns its `result` or why it `failed`, and in either case its `seconds` and `energy`."""
    outcome: dict[str, Any] = {"result": None, "failed": None}
    with _StepCost(hardware) as cost:
        try:
            outcome["result"] = child.load_function(function)(**arguments)
        except BaseException as error:
            traceback.print_exc()
            outcome["failed"] = (classify(error).value, describe(error))
    return outcome | cost.record()


def estimated(cpu_seconds: float, seconds: float) -> dict[str, float]:
    """Runs in a child: estimates the energy in Wh of another child from its processor and wall time."""
    from winnow.hardware import energy

    return {"wh": energy.estimated_wh(cpu_seconds, seconds)}


class _StepCost:
    """Context manager that measures the time and the energy of a block."""

    def __init__(self, hardware: Hardware) -> None:
        from winnow.hardware.energy import EnergyMeter

        self._meter = EnergyMeter(hardware.carbon_g_per_kwh, hardware.device, hardware.devices)

    def __enter__(self) -> _StepCost:
        self._started = time.perf_counter()
        self._energy = self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)
        self.seconds = round(time.perf_counter() - self._started, 3)

    def record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "energy": {"wh": self._energy.wh, "co2_g": self._energy.co2_g}}


class _CancelCheck:
    """Callable that returns whether the search has cancelled a job, by the file `STOP` or by removing the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._next = folder, 0.0

    def __call__(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LOOK_S
        return (self._folder / STOP).exists() or not self._folder.exists()


def read_spent(folder: Path) -> dict[str, float]:
    """Returns the energy of a cancelled job; empty if the job did not write it."""
    try:
        return json.loads((folder / SPENT).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}
