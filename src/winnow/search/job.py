"""What the jobs of a search have in common, wherever a launcher runs them: steps in child processes, limits, an account of energy.

What a step takes is counted however it ends. One that fails is still metered by its own process, which outlives the failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow.core.errors import Reason, classify, describe
from winnow.core.files import write_json
from winnow.hardware.energy import EnergyCounters
from winnow.search import child

STOP = "stop"  # a file in a job's folder, put by the search: nobody waits for it any more
LOOK_S = 1.0  # between looks for it
SPENT = "spent.json"  # the energy of a job that was cancelled
ESTIMATE_S = 60.0  # that estimating the energy of what was killed may take
RIVALS = (
    "rivals.json"  # in a trial's folder: what the base model is, its figures, those of each trial on the front then
)


class Job:
    """Work for a search, in steps: each in a child process, within the limits of a trial, its energy counted however it ends.

    Args:
        name: for its lines.

    Attributes:
        seconds: that each step has taken.
        energy: `wh` and `co2_g` of all steps so far. The meter of a step that is killed dies with it: what its GPUs took is
            read off their counters, what processor and memory took is estimated from its times, and is `unmetered_wh`.
        cancelled: asked now and then whether the search still wants the outcome.
    """

    def __init__(
        self, cfg: DictConfig, name: str, folder: Path, log: Callable[[str], None], environment: Mapping[str, str]
    ) -> None:
        self.folder, self.cancelled = folder, _Cancelled(folder)
        self.seconds: dict[str, float] = {}
        self.energy: dict[str, float] = {}
        self._started = time.perf_counter()
        self._settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self._environment = environment
        self._limits = child.Limits(60 * cfg.limits.minutes if cfg.limits.minutes else None, cfg.limits.memory_bytes)
        # with several workers a line says whose it is
        self._log = (lambda line: log(f"[{name}] {line}")) if cfg.workers > 1 else log

    def step(self, name: str, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `function` ("module:name") returns for the settings and the arguments.

        Raises:
            child.Failed: with the typed reason.
            child.Cancelled: nobody waits for it any more.
        """
        hardware = self._settings["hardware"]
        left_s = self._limits.seconds and max(1.0, self._limits.seconds - (time.perf_counter() - self._started))
        gpus = EnergyCounters.read(hardware["device"], hardware["devices"], {**os.environ, **self._environment})
        try:
            done = child.call(
                "winnow.search.job:metered",
                {"function": function, "settings": self._settings, "arguments": dict(arguments)},
                child.Limits(left_s, self._limits.memory_bytes),
                self._log,
                self.folder / "log.txt",
                self._environment,
                self.cancelled,
            )
        except child.Ended as ended:
            self.seconds[name] = round(ended.seconds, 3)
            estimated_wh = self._estimated_wh(ended)
            wh = estimated_wh + ((gpus.spent_wh() if gpus is not None else None) or 0.0)
            co2_g = wh / 1000 * hardware["carbon_g_per_kwh"]
            self._count({"wh": wh, "co2_g": co2_g, "unmetered_wh": estimated_wh})
            raise
        self.seconds[name] = done["seconds"]
        self._count(done["energy"])
        if done["failed"]:
            reason, message = done["failed"]
            raise child.Failed(Reason(reason), message)
        result: dict[str, Any] = done["result"]
        return result

    def all_seconds(self) -> dict[str, float]:
        """Those of the steps and their parts, and of the whole job."""
        return self.seconds | {"total": round(time.perf_counter() - self._started, 3)}

    def leave_spent(self) -> None:
        """Puts the energy so far into the folder, for the search that goes on; there may be no folder any more."""
        with contextlib.suppress(OSError):
            write_json(self.folder / SPENT, self.energy)

    def _count(self, energy: Mapping[str, float]) -> None:
        for name, used in energy.items():
            self.energy[name] = self.energy.get(name, 0.0) + used

    def _estimated_wh(self, ended: child.Ended) -> float:
        """Of processor and memory, for a child that was killed; asked of another child, which knows the machine already."""
        times = {"cpu_seconds": ended.cpu_seconds, "seconds": ended.seconds}
        try:
            found = child.call(
                "winnow.search.job:estimated", times, child.Limits(ESTIMATE_S), self._log, self.folder / "log.txt"
            )
        except (
            child.Ended,
            OSError,
            EOFError,
        ):  # codecarbon is not installed, or the fork server was ended with the search
            return 0.0
        return float(found["wh"])


def metered(
    function: str, settings: dict[str, Any], arguments: dict[str, Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """In the child: what a step returns (`result`) or why it `failed`, and what it took in `seconds` and `energy` either way."""
    found: dict[str, Any] = {"result": None, "failed": None}
    with _Cost(settings) as cost:
        try:
            found["result"] = child.named(function)(settings=settings, **arguments, log=log)
        except BaseException as error:
            traceback.print_exc()
            found["failed"] = (classify(error).value, describe(error))
    return found | cost.record()


def estimated(cpu_seconds: float, seconds: float, log: Callable[[str], None]) -> dict[str, float]:
    """In a child: the energy of another one that took these times."""
    from winnow.hardware import energy

    return {"wh": energy.estimated_wh(cpu_seconds, seconds)}


class _Cost:
    """Time and energy of a block."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from winnow.hardware.energy import EnergyMeter

        hardware = settings["hardware"]
        self._meter = EnergyMeter(hardware["carbon_g_per_kwh"], hardware["device"], hardware["devices"])

    def __enter__(self) -> _Cost:
        self._started = time.perf_counter()
        self._energy = self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)
        self.seconds = round(time.perf_counter() - self._started, 3)

    def record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "energy": {"wh": self._energy.wh, "co2_g": self._energy.co2_g}}


class _Cancelled:
    """Whether the search has put its sign into the folder of a trial, or has removed the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._next = folder, 0.0

    def __call__(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LOOK_S
        return (self._folder / STOP).exists() or not self._folder.exists()


def read_spent(folder: Path) -> dict[str, float]:
    """The energy of a job that was cancelled, as far as it could still say so."""
    try:
        return json.loads((folder / SPENT).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}
