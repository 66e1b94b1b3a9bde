"""Reads what the kernel and the GPU driver count about the use of the processor and the GPUs.

Every source is optional: an old kernel, a container, macOS or a machine without NVML has fewer. What cannot be read is None or
empty. Reading all sources takes about 0.3 ms for the processor and a few milliseconds for each GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.hardware.inventory import used_gpus

NS, US = 1e-9, 1e-6
SLOWDOWNS = {  # NVML API reference, nvmlClocksEventReasons; a power cap and an idle GPU are normal and not listed
    0x08: "the hardware has slowed it down",
    0x20: "it is too hot (software)",
    0x40: "it is too hot (hardware)",
    0x80: "its power supply has slowed it down",
}


@dataclass(frozen=True)
class GpuCounters:
    """Counters of one GPU.

    Attributes:
        process_shares: share of the multiprocessors that each process has used since the requested time, by process id.
        slowdowns: why the clock is throttled now, in words.
        clock_mhz: current clock of the multiprocessors; None where it is not known.
    """

    name: str
    process_shares: Mapping[int, float] = field(default_factory=dict)
    slowdowns: tuple[str, ...] = ()
    clock_mhz: int | None = None


@dataclass(frozen=True)
class Counters:
    """A reading of all counters. Seconds run from an arbitrary fixed start, so that only differences are meaningful.

    Attributes:
        thread_cpu_s: processor time of the calling thread.
        process_cpu_s: processor time of all threads of this process.
        waited_s: how long each thread of this process was ready to run and had no core, by thread id.
        pressure_s: how long some process of the machine was ready to run and had no core.
        throttled_s: how long the control group of this process was stopped at its quota, summed over cores.
        stolen_s: how long the hypervisor gave each core that this process may use to another machine, by core name.
        busy_s: how long those cores worked, for any process.
    """

    wall_s: float
    thread_cpu_s: float = 0.0
    process_cpu_s: float = 0.0
    waited_s: Mapping[int, float] | None = None
    pressure_s: float | None = None
    throttled_s: float | None = None
    stolen_s: Mapping[str, float] | None = None
    busy_s: float | None = None
    gpus: tuple[GpuCounters, ...] = ()


def read(device: str, since_epoch_s: float | None = None, root: Path = Path("/"), devices: int = 1) -> Counters:
    """Reads all counters now.

    Args:
        device, devices: those of `hardware` that the work runs on; use of other GPUs does not disturb it.
        since_epoch_s: time from which the processes' use of the GPUs counts; None leaves that use out.
        root: root of the file system that contains `proc` and `sys`.
    """
    stolen, busy = _cores(root)
    return Counters(
        wall_s=time.perf_counter(),
        thread_cpu_s=time.thread_time(),
        process_cpu_s=time.process_time(),
        waited_s=_waited(root),
        pressure_s=_pressure(root),
        throttled_s=_throttled(root),
        stolen_s=stolen,
        busy_s=busy,
        gpus=_gpus(since_epoch_s, devices) if device == "cuda" else (),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _waited(root: Path) -> dict[int, float] | None:
    """Reads the waiting time of each thread: the second field of its schedstat, in ns.

    The schedstat of the process covers the main thread only. Source: Linux, Documentation/scheduler/sched-stats.rst.
    """
    try:
        threads = list((root / "proc/self/task").iterdir())
    except OSError:
        return None
    waited_s = {}
    for thread in threads:  # a thread may have ended in the meantime
        fields = _text(thread / "schedstat").split()
        if len(fields) >= 2:
            waited_s[int(thread.name)] = int(fields[1]) * NS
    return waited_s or None


def _pressure(root: Path) -> float | None:
    """Reads the time for which some process waited for a core. Source: Linux, Documentation/accounting/psi.rst."""
    for line in _text(root / "proc/pressure/cpu").splitlines():
        if line.startswith("some") and "total=" in line:
            return int(line.rpartition("total=")[2]) * US
    return None


def _throttled(root: Path) -> float | None:
    """Reads the throttled time of the control group, v2 before v1, whose time is in ns.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst.
    """
    groups = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    v2 = [f"sys/fs/cgroup{path}/cpu.stat" for _, controllers, path in groups if not controllers]
    v1 = [f"sys/fs/cgroup/cpu{path}/cpu.stat" for _, controllers, path in groups if "cpu" in controllers.split(",")]
    # In a container the path may be that of the host; the files of this group are then at the top.
    for name in [*v2, *v1, "sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"]:
        for line in _text(root / name).splitlines():
            key, _, value = line.partition(" ")
            if key in ("throttled_usec", "throttled_time"):
                return int(value) * (US if key == "throttled_usec" else NS)
    return None


def _cores(root: Path) -> tuple[dict[str, float] | None, float | None]:
    """Reads the stolen time of each core that this process may use, and the sum of their busy times. Source: proc(5)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    tick_s = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
    stolen, busy = {}, 0.0
    for line in _text(root / "proc/stat").splitlines():
        name, *fields = line.split()
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdigit() and (allowed is None or int(number) in allowed):
            ticks = [int(f) for f in fields] + [0] * 10
            user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
            stolen[name] = steal * tick_s
            busy += (user + nice + system + irq + softirq) * tick_s
    return (stolen, busy) if stolen else (None, None)


def _gpus(since_epoch_s: float | None, devices: int) -> tuple[GpuCounters, ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    gpus = used_gpus("cuda", devices)
    if not gpus:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(pynvml, gpu.uuid, gpu.name, since_epoch_s) for gpu in gpus)
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, uuid: str, name: str, since_epoch_s: float | None) -> GpuCounters:
    """Reads the counters of one GPU; a GPU, or a slice of it, may not support some of the queries."""

    def query(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    handle = query("nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return GpuCounters(name)
    samples = (
        query("nvmlDeviceGetProcessUtilization", handle, int(since_epoch_s / US)) if since_epoch_s is not None else None
    )
    samples_by_pid: dict[int, list[int]] = {}
    for sample in samples or ():
        samples_by_pid.setdefault(int(sample.pid), []).append(int(sample.smUtil))
    reasons = query("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # drivers before 535 use the old name
        reasons = query("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    return GpuCounters(
        name,
        process_shares={pid: sum(shares) / len(shares) / 100 for pid, shares in samples_by_pid.items()},
        slowdowns=tuple(words for bit, words in SLOWDOWNS.items() if reasons & bit),
        clock_mhz=query("nvmlDeviceGetClockInfo", handle, getattr(nvml, "NVML_CLOCK_SM", 1)),
    )
