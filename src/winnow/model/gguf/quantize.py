"""Quantizes a GGUF file with llama.cpp's own quantizer, through its C interface."""

from __future__ import annotations

import ctypes
import errno
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.core.libraries import require
from winnow.model.gguf.native import silent

if TYPE_CHECKING:
    import numpy as np


def quantize(
    source: Path, target: Path, file_type: str, importance: Mapping[str, np.ndarray] | None = None, threads: int = 1
) -> None:
    """Writes `target` from the unquantized `source`; `file_type` is llama.cpp's name: Q4_K_M, Q8_0, ...

    Args:
        importance: mean squared inputs [in] by tensor name.

    Raises:
        OSError: the file could not be written.
        RuntimeError: llama.cpp failed; the message holds its errors.
    """
    require("gguf", "llama_cpp")
    import gguf
    import llama_cpp
    import numpy as np

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{file_type}"].value
    # both must stay referenced until the call returns: `params` holds bare pointers
    vectors = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in (importance or {}).items()}
    entries = _entries(vectors)
    if vectors:
        params.imatrix = entries
    with silent() as errors:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        is_full = shutil.disk_usage(target.parent).free < source.stat().st_size
        target.unlink(missing_ok=True)
        if "iostream" in " ".join(errors):
            raise OSError(errno.ENOSPC if is_full else errno.EIO, "llama.cpp could not write", str(target))
        raise RuntimeError(f"llama.cpp could not quantize to {file_type}: {' '.join(errors) or f'code {code}'}")


def _entries(vectors: Mapping[str, np.ndarray]) -> ctypes.Array[ctypes.Structure]:
    """Returns llama.cpp's array of named vectors, which ends with an entry without a name."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(vectors) + 1))()
    for entry, (name, vector) in zip(entries, vectors.items(), strict=False):
        entry.name = name.encode()
        entry.data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = vector.size
    return entries  # type: ignore[no-any-return]


def tensor_types(path: Path) -> dict[str, int]:
    """Returns the number of tensors of each type in a GGUF file."""
    import gguf

    return dict(sorted(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors).items()))
