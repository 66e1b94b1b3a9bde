"""What a CUDA graph does, on the processor: the kernels of one step are recorded and repeated on the very same tensors.

No Python of the step runs again: a number that it counted, or a branch that it took, is repeated as it was. What would wait for the
device, or copy from the host, is an error, as it is for a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        with self:  # in inference mode operations come that consist of others, and may wait inside
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(out)))
        return out


def capture(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """In place of `graphs.capture`."""
    rewind()
    step()
    rewind()
    with _Recorder() as recorder:
        step()
    rewind()

    def replay() -> None:
        for func, args, kwargs, before in recorder.calls:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay
