"""Measures a model's footprint: bytes on disk, bytes of weights in memory, and peak memory during a request.

The three differ, and none follows from another: a 4-bit checkpoint may be unpacked to 32 bits when it is loaded. So weights are
measured on the tensors in memory, and the peak by the allocator (CUDA) or the kernel (processor).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.hardware.inventory import visible_gpus
from winnow.model import manifest
from winnow.model.lm import LM

if TYPE_CHECKING:
    from torch import Tensor, nn

# objects of these libraries contain tensors that are neither parameters nor buffers: scales, code books, nested states
_HOLDERS = ("bitsandbytes", "hqq", "compressed_tensors", "auto_round", "auto_round_extension", "winnow")


def disk_bytes(lm: LM) -> int:
    """Returns the bytes on disk of all files that are needed to load the model.

    Raises:
        UserError: the model only exists in memory, or is not on this machine.
    """
    if lm.path is None:
        raise UserError(f"{lm.name} only exists in memory, its size on disk is not known; save it first")
    folder = Path(lm.path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        # a local lookup only: it returns a path, or a marker of why there is none
        config_file = try_to_load_from_cache(lm.path, "config.json")
        if not isinstance(config_file, str):
            raise UserError(f"{lm.path} is neither a folder nor a model in the Hugging Face cache of this machine")
        folder = Path(config_file).parent
    return manifest.sizes(folder)["size_bytes"]


def weights_memory_bytes(model: nn.Module) -> int:
    """Returns the bytes of the distinct storages behind all tensors of the model; tied and shared tensors count once.

    Counts parameters, buffers, and the further tensors of quantization libraries (absmax, code books, zero points). Weights on
    the meta device, offloaded or not loaded, count nothing.
    """
    storages = {}
    for tensor in iterate_tensors(model):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def iterate_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yields every plain tensor that the model keeps alive; a tensor may be yielded more than once."""
    visited_ids: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":  # `modules()` visits the children; _parameters and _buffers are dicts
                yield from _tensors(value, visited_ids)


def _tensors(value: Any, visited_ids: set[int]) -> Iterator[Tensor]:
    from torch import Tensor, nn

    if id(value) in visited_ids:
        return
    visited_ids.add(id(value))
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a wrapper without its own storage, such as torchao's
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name), visited_ids)
        else:
            yield value
        yield from _tensors(vars(value), visited_ids)  # bitsandbytes: quant_state, CB, SCB
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _tensors(item, visited_ids)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, visited_ids)
    elif not isinstance(value, nn.Module | type) and type(value).__module__.split(".")[0] in _HOLDERS:
        yield from _tensors(getattr(value, "__dict__", {}), visited_ids)


class PeakMemory:
    """Measures the peak memory of work as a context manager; read `peak_bytes` afterwards.

    CUDA: the allocator's peak of all devices together, weights included. For runtimes that do not use torch's allocator and take
    their memory when they start (`torch_allocator=False`): the memory that NVML reports in use on the visible devices, whoever uses
    it. Processor: the peak resident set of this process (libraries and mapped files included: some hundred MB), counted from the
    start of the work where the kernel allows a reset (Linux). Elsewhere `since_start` is true, and the peak since the process
    began is an upper bound.
    """

    def __init__(self, device: str, torch_allocator: bool = True) -> None:
        self.device = device
        self.torch_allocator = torch_allocator
        self.peak_bytes = 0
        self.since_start = False

    def __enter__(self) -> Self:
        if self.device == "cuda" and self.torch_allocator:
            import torch

            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        elif self.device != "cuda":
            self.since_start = not _reset_peak_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device == "cuda" and not self.torch_allocator:
            self.peak_bytes = _gpu_memory_in_use()
        elif self.device == "cuda":
            import torch

            self.peak_bytes = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        else:
            self.peak_bytes = _peak_resident_bytes()


def _reset_peak_resident() -> bool:
    """Resets the peak to the current resident set; returns false if the system cannot (proc(5), /proc/pid/clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _gpu_memory_in_use() -> int:
    """Returns the bytes in use on the GPUs that this process may use.

    Raises:
        MissingExtra: NVML's Python bindings are not installed.
    """
    require("pynvml")
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in visible_gpus()]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def _peak_resident_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere: getrusage(2)
    import psutil

    return int(psutil.Process().memory_info().peak_wset)
