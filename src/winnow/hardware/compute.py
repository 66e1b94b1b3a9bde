"""Chooses the dtype that a device computes fastest in, for `hardware.dtype=auto` and `precision=auto`.

A processor without bfloat16 instructions multiplies bfloat16 ten times more slowly than float32; a GPU with tensor cores does the
opposite. So the compute dtype follows from the device, while the saved dtype follows from the model. The choice is read from
instruction flags and compute capabilities and is not timed, so that every process of a study gets the same answer.

It costs microseconds, and imports torch or a driver's library only when a GPU is queried.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path

FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"
# bfloat16 matrix instructions of x86 and ARM processors
_FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# values of oneDNN's variables that allow bfloat16 instructions; any other value disables them
_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ONEDNN_FAST = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "DEFAULT", "ALL")
_AMPERE, _VOLTA = (8, 0), (7, 0)  # compute capabilities: the first tensor cores for bfloat16, and for float16


def fastest_dtype(device: str) -> str:
    """Returns the name of the torch dtype in which `device` (`cpu` or `cuda`) multiplies matrices fastest."""
    if device == "cuda":
        from winnow.hardware.inventory import visible_gpus

        # the least capable of several GPUs decides; GPUs that are not in this machine are assumed to be recent
        return dtype_for_capability(min((gpu.capability for gpu in visible_gpus() if gpu.capability), default=_AMPERE))
    return BFLOAT16 if has_fast_bfloat16(_processor_flags(), os.environ) else FLOAT32


def dtype_for_capability(capability: tuple[int, int]) -> str:
    """Returns the fastest dtype of a CUDA device.

    Source: CUDA C++ Programming Guide, "Compute Capabilities", arithmetic instructions.
    """
    if capability >= _AMPERE:
        return BFLOAT16
    return FLOAT16 if capability >= _VOLTA else FLOAT32


def has_fast_bfloat16(flags: Collection[str], environment: Mapping[str, str]) -> bool:
    """Returns whether a processor with these flags has instructions that multiply bfloat16.

    `ONEDNN_MAX_CPU_ISA` in the environment can forbid torch to use them. AVX-512 without its bfloat16 extension converts every
    number, which is no faster than float32.
    """
    if _FAST_FLAGS.isdisjoint(flags):
        return False
    limit = next((environment[name].upper() for name in _ONEDNN if environment.get(name)), "DEFAULT")
    return limit.startswith(_ONEDNN_FAST)


def training_precision(dtype: str) -> str:
    """Returns Lightning's precision name for training where products are fastest in `dtype`."""
    return "bf16-mixed" if dtype == BFLOAT16 else "32-true"


def slow_dtype_warning(dtype: str, device: str) -> str:
    """Returns a warning for the log if another dtype is much faster on the device than `dtype`; otherwise an empty string."""
    fastest = fastest_dtype(device)
    half = (BFLOAT16, FLOAT16)
    if device == "cpu" and dtype in half and dtype != fastest:
        return (
            f"{dtype} is slow on this processor, which has no instructions for it; {fastest} is up to 10 times faster"
        )
    if device == "cuda" and dtype == BFLOAT16 and fastest != BFLOAT16:
        return f"bfloat16 is slow on this GPU, whose tensor cores do not multiply it; {fastest} is faster"
    return ""


@functools.cache
def _processor_flags() -> frozenset[str]:
    """Returns the flags that the Linux kernel reports; empty on other systems, which then count as having none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    key = "Features" if platform.machine() in ("aarch64", "arm64") else "flags"
    flags = next((line.partition(":")[2] for line in lines if line.startswith(key)), "")
    return frozenset(flags.split())
