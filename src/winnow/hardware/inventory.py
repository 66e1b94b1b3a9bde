"""Lists the processor and the GPUs of this machine.

Nothing here starts CUDA, because a process that has used CUDA cannot be forked, and trials are forks. GPUs are queried through
NVML instead, which every driver includes.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU board.

    Attributes:
        capability: CUDA compute capability; None where the driver does not report it.
        index: NVML's index among all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says; None where NVML is not used.
        slices: the UUIDs of its MIG slices.
    """

    name: str
    uuid: str
    memory_bytes: int
    capability: tuple[int, int] | None = None
    index: int | None = None
    slices: tuple[str, ...] = ()


def available_cores() -> int:
    """Returns how many cores this process may run on; in a container or under taskset, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")) and ":" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def physical_memory_bytes() -> int:
    """Returns the machine's memory, or the limit of the container (cgroup v2, then v1) where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def used_gpus(device: str, devices: int, environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Returns the boards that work with `hardware.device` and `hardware.devices` runs on: CUDA takes the first visible GPUs.

    The result is empty for a processor. A board counts once, however many of its slices are visible.
    """
    if device != "cuda":
        return ()
    return tuple({gpu.uuid: gpu for gpu in visible_gpus(environment)[:devices]}.values())


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Returns the NVIDIA GPUs that CUDA_VISIBLE_DEVICES lets a process use, in NVML's order (by PCI bus).

    Without NVML's Python bindings torch is asked, which starts CUDA in this process.

    Args:
        environment: environment variables of that process.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    try:
        import pynvml
    except ImportError:
        return _gpus_of_torch()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            Gpu(
                pynvml.nvmlDeviceGetName(h),
                pynvml.nvmlDeviceGetUUID(h),
                int(pynvml.nvmlDeviceGetMemoryInfo(h).total),
                _capability(h),
                index,
                _slices(h) if "MIG-" in (visible or "") else (),
            )
            for index, h in enumerate(handles)
        ]
    finally:
        pynvml.nvmlShutdown()
    return tuple(filter_visible(gpus, visible))


def _capability(handle: Any) -> tuple[int, int] | None:
    import pynvml

    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


def _slices(handle: Any) -> tuple[str, ...]:
    """Returns the UUIDs of a board's MIG slices; a board may have fewer slices than its maximum count.

    Source: NVML API reference, "Multi Instance GPU Management".
    """
    import pynvml

    uuids = []
    try:
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with contextlib.suppress(pynvml.NVMLError):
                uuids.append(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
    except pynvml.NVMLError:
        pass  # a board, or a driver, without MIG
    return tuple(uuids)


def filter_visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Returns the GPUs that a value of CUDA_VISIBLE_DEVICES allows: indices or UUID prefixes, up to the first invalid one.

    A MIG slice, by its own UUID or as `MIG-<GPU>/<instance>/<instance>`, counts as its GPU, which NVML meters.
    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        entry = entry.strip()
        if entry.isdigit():
            matching = gpus[int(entry) : int(entry) + 1]
        else:
            board = entry.removeprefix("MIG-").partition("/")[0] if entry.startswith("MIG-GPU-") else entry
            matching = [gpu for gpu in gpus if board and any(u.startswith(board) for u in (gpu.uuid, *gpu.slices))]
            matching = matching or (gpus if entry.startswith("MIG-") and len(gpus) == 1 else [])
        if len(matching) != 1:
            break
        chosen += matching
    return chosen


def _gpus_of_torch() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, f"GPU-{p.uuid}", p.total_memory, (p.major, p.minor)) for p in properties)
