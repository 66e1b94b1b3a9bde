"""Measures the speed and memory of this machine and of the configured hardware, for rough forecasts.

A GPU need not be present: its speed is the vendor's figure (`hardware.tflops`). The speed of a processor is measured in a
fraction of a second.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.estimate.cost import StageCost
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import physical_memory_bytes, visible_gpus

if TYPE_CHECKING:
    import torch

EFFICIENCY = 0.4  # share of the fastest product's speed that whole blocks reach
DISK_BYTES_PER_S = 1e9  # write speed of an SSD
GPU_SORTS_PER_S = 1e9  # keys sorted with their indices, on any data-centre GPU
_SECONDS = 0.03  # duration of each measurement
_KERNELS = 16


@dataclass(frozen=True)
class Machine:
    """Speeds per second, and memory in bytes.

    Attributes:
        flops: operations a second in large matrix products on the device; None where it is not known.
        traffic: bytes a second read and written in main memory.
        sorts: weights a second sorted on the device.
        kernel_bytes: memory that oneDNN uses for each shape of a product.
        kernels: maximum number of shapes that oneDNN caches.
        process_bytes: memory of a process after its imports, before any weight.
        host_limit: main memory; None where the configured device is not in this machine.
    """

    flops: float | None
    traffic: float
    sorts: float
    kernel_bytes: float = 0.0
    kernels: int = 1024  # oneDNN's default; ONEDNN_PRIMITIVE_CACHE_CAPACITY
    process_bytes: int = 0
    host_limit: int | None = None

    def seconds(self, work: StageCost) -> float | None:
        """Returns a rough time for the work, without the start of the process; None if the speed is not known."""
        if work.flops and not self.flops:
            return None
        products = work.flops / (EFFICIENCY * self.flops) if self.flops else 0.0
        return products + work.traffic_bytes / self.traffic + work.sorted_weights / self.sorts

    def kernels_bytes(self, work: StageCost) -> float:
        return min(work.matmuls, self.kernels) * self.kernel_bytes


def measure_machine(hardware: Hardware, dtype: str, imports: Iterable[str] = ()) -> Machine:
    """Measures the machine for work in `dtype`, in a process that imports the installed ones of `imports`."""
    import torch

    previous_threads = torch.get_num_threads()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    try:
        torch_dtype: torch.dtype = getattr(torch, dtype)
        on_cpu = hardware.device == "cpu"
        is_local = on_cpu or len(visible_gpus()) >= hardware.devices
        flops = product_flops(torch_dtype) if on_cpu else (hardware.tflops or 0) * 1e12 or None
        kernel_bytes = _kernel_bytes(torch_dtype) if on_cpu else 0.0
        sorts = _sorts_per_s() if on_cpu else GPU_SORTS_PER_S
        traffic = _traffic_per_s()
    finally:
        torch.set_num_threads(previous_threads)
    _import("codecarbon.core.emissions", "peft", *imports)  # transformers imports peft when it loads a model
    return Machine(
        flops=flops,
        traffic=traffic,
        sorts=sorts,
        kernel_bytes=kernel_bytes,
        process_bytes=resident_bytes(),
        host_limit=physical_memory_bytes() if is_local else None,
    )


def _import(*names: str) -> None:
    """Imports the installed ones of these modules, and hides their warnings about this machine."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            for name in names:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


def resident_bytes() -> int:
    """Returns the main memory that this process uses now."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


def _fastest_seconds(work: Callable[[], object]) -> float:
    """Returns the time of the fastest of several repetitions, because other work on the machine only slows them."""
    work()
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or fastest == float("inf"):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def product_flops(dtype: torch.dtype) -> float:
    """Returns the operations a second of large matrix products on the processor."""
    import torch

    size = 512
    a, b = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    return 2 * size**3 / _fastest_seconds(lambda: a @ b)


def _sorts_per_s() -> float:
    """Returns the numbers sorted a second, in rows as long as those of a weight matrix."""
    import torch

    numbers = torch.rand(128, 1024)
    return numbers.numel() / _fastest_seconds(lambda: numbers.argsort(dim=-1, stable=True))


def _traffic_per_s() -> float:
    """Returns the bytes copied a second, in arrays larger than the caches."""
    import torch

    source, target = torch.zeros(1 << 24, dtype=torch.uint8), torch.empty(1 << 24, dtype=torch.uint8)
    return 2 * source.numel() / _fastest_seconds(lambda: target.copy_(source))


def _kernel_bytes(dtype: torch.dtype) -> float:
    """Returns how much the resident memory grows for each product of a new shape."""
    import torch

    weight = torch.rand(512, 256, dtype=dtype)
    torch.nn.functional.linear(torch.rand(255, 256, dtype=dtype), weight)
    before = resident_bytes()
    for rows in range(_KERNELS):
        torch.nn.functional.linear(torch.rand(16 + rows, 256, dtype=dtype), weight)
    return max(0.0, (resident_bytes() - before) / _KERNELS)
