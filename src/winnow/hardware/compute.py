"""The type of number that a device computes fastest in: what `hardware.dtype=auto` and `precision=auto` mean.

A processor without instructions for bfloat16 multiplies it ten times more slowly than float32; a GPU with tensor cores does the
opposite. So the type to compute in follows from the device, while the type that is saved follows from the model. The answer is
read off instruction flags and capabilities, not timed, so that every process of a study gives the same one.

Costs microseconds and imports neither torch nor a driver's library, unless a GPU is asked about.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path

FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"
# processors: matrix instructions of x86, and of ARM where they are announced
_FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# values of oneDNN's variables under which instructions for bfloat16 may be used; anything else masks them
_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_FAST = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "DEFAULT", "ALL")
_AMPERE, _VOLTA = (8, 0), (7, 0)  # compute capabilities: the first tensor cores for bfloat16, and for float16


def fastest(device: str) -> str:
    """The name of torch's type that `device` (`cpu` or `cuda`) computes matrix products fastest in."""
    if device == "cuda":
        from winnow.hardware.inventory import visible_gpus

        # of GPUs of several kinds the least able; those that are not in this machine are taken to be recent
        return of_capability(min((gpu.capability for gpu in visible_gpus() if gpu.capability), default=_AMPERE))
    return BFLOAT16 if has_fast_bfloat16(_processor_flags(), os.environ) else FLOAT32


def of_capability(capability: tuple[int, int]) -> str:
    """For a CUDA device. Source: CUDA C++ Programming Guide, "Compute Capabilities", arithmetic instructions."""
    if capability >= _AMPERE:
        return BFLOAT16
    return FLOAT16 if capability >= _VOLTA else FLOAT32


def has_fast_bfloat16(flags: Collection[str], environment: Mapping[str, str]) -> bool:
    """Whether a processor with these flags multiplies bfloat16 by instructions of its own.

    `ONEDNN_MAX_CPU_ISA` in the environment can forbid torch to use them. AVX-512 without its bfloat16 extension converts every
    number, which is no faster than float32.
    """
    if _FAST_FLAGS.isdisjoint(flags):
        return False
    limit = next((environment[name].upper() for name in _ONEDNN if environment.get(name)), "DEFAULT")
    return limit.startswith(_ONEDNN_FAST)


def training_precision(dtype: str) -> str:
    """Lightning's name of how to train where products are fastest in `dtype`."""
    return "bf16-mixed" if dtype == BFLOAT16 else "32-true"


def slow_here(dtype: str, device: str) -> str:
    """A line for the log where `dtype` was asked for and another one is much faster on the device; empty where it is not."""
    best = fastest(device)
    half = (BFLOAT16, FLOAT16)
    if device == "cpu" and dtype in half and dtype != best:
        return f"{dtype} is slow on this processor, which has no instructions for it; {best} is up to 10 times faster"
    if device == "cuda" and dtype == BFLOAT16 and best != BFLOAT16:
        return f"bfloat16 is slow on this GPU, whose tensor cores do not multiply it; {best} is faster"
    return ""


@functools.cache
def _processor_flags() -> frozenset[str]:
    """As the Linux kernel names them; none on other systems, whose processors then count as without."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    wanted = "Features" if platform.machine() in ("aarch64", "arm64") else "flags"
    found = next((line.partition(":")[2] for line in lines if line.startswith(wanted)), "")
    return frozenset(found.split())
