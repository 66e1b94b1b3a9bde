"""How fast and how large this machine and the hardware asked about are, for rough forecasts.

A GPU need not be there to be asked about: its speed is its vendor's (`hardware.tflops`). What a processor does is measured on
the spot in a fraction of a second.
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

EFFICIENCY = 0.4  # of the fastest product's speed that whole blocks reach
DISK_BYTES_PER_S = 1e9  # what an SSD writes
GPU_SORTS_PER_S = 1e9  # of keys with their indices, on any data-centre GPU
_SECONDS = 0.03  # of each measurement
_KERNELS = 16


@dataclass(frozen=True)
class Machine:
    """Speeds a second, and memory in bytes.

    Attributes:
        flops: of large matrix products on the device; None where it is not known.
        traffic: bytes read and written in main memory.
        sorts: of weights put in order on the device.
        kernel_bytes: that oneDNN keeps for each shape of a product.
        kernels: that it keeps at most.
        process_bytes: of a process that has imported what the work needs, before any weight.
        host_limit: main memory; None where the device asked about is not in this machine.
    """

    flops: float | None
    traffic: float
    sorts: float
    kernel_bytes: float = 0.0
    kernels: int = 1024  # its default; ONEDNN_PRIMITIVE_CACHE_CAPACITY
    process_bytes: int = 0
    host_limit: int | None = None

    def seconds(self, work: StageCost) -> float | None:
        """Rough: without the start of the process."""
        if work.flops and not self.flops:
            return None
        products = work.flops / (EFFICIENCY * self.flops) if self.flops else 0.0
        return products + work.traffic_bytes / self.traffic + work.sorted_weights / self.sorts

    def kernels_bytes(self, work: StageCost) -> float:
        return min(work.matmuls, self.kernels) * self.kernel_bytes


def measured(hardware: Hardware, dtype: str, imports: Iterable[str] = ()) -> Machine:
    """The machine for work in `dtype`, in a process that has imported `imports` (those that are installed)."""
    import torch

    before = torch.get_num_threads()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    try:
        kind: torch.dtype = getattr(torch, dtype)
        on_cpu = hardware.device == "cpu"
        here = on_cpu or len(visible_gpus()) >= hardware.devices
        flops = product_flops(kind) if on_cpu else (hardware.tflops or 0) * 1e12 or None
        kernel_bytes = _kernel_bytes(kind) if on_cpu else 0.0
        sorts = _sorts() if on_cpu else GPU_SORTS_PER_S
        traffic = _traffic()
    finally:
        torch.set_num_threads(before)
    _import("codecarbon.core.emissions", "peft", *imports)  # transformers imports peft when it loads a model
    return Machine(
        flops=flops,
        traffic=traffic,
        sorts=sorts,
        kernel_bytes=kernel_bytes,
        process_bytes=resident_bytes(),
        host_limit=physical_memory_bytes() if here else None,
    )


def _import(*names: str) -> None:
    """Imports what is installed of them, without their remarks on what this machine lacks."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            for name in names:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


def resident_bytes() -> int:
    """Main memory that this process takes now."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repetitions: whatever else the machine does only makes it slower."""
    work()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def product_flops(dtype: torch.dtype) -> float:
    """Operations a second of large matrix products on the processor."""
    import torch

    size = 512
    a, b = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: a @ b)


def _sorts() -> float:
    """A second, in rows as long as those of a matrix."""
    import torch

    numbers = torch.rand(128, 1024)
    return numbers.numel() / _fastest(lambda: numbers.argsort(dim=-1, stable=True))


def _traffic() -> float:
    """Bytes a second, more than caches hold."""
    import torch

    source, target = torch.zeros(1 << 24, dtype=torch.uint8), torch.empty(1 << 24, dtype=torch.uint8)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source))


def _kernel_bytes(dtype: torch.dtype) -> float:
    """What the resident memory grows by for each product of a new shape."""
    import torch

    weight = torch.rand(512, 256, dtype=dtype)
    torch.nn.functional.linear(torch.rand(255, 256, dtype=dtype), weight)
    before = resident_bytes()
    for rows in range(_KERNELS):
        torch.nn.functional.linear(torch.rand(16 + rows, 256, dtype=dtype), weight)
    return max(0.0, (resident_bytes() - before) / _KERNELS)
