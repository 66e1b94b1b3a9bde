"""Writes a transformers model as a GGUF file in full or half precision, one tensor in memory at a time.

python -c "from winnow.nano.embedded import trained; from winnow.model.gguf.export import export; export(trained(), 'nano.gguf')"
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.model.gguf import architectures
from winnow.model.lm import LM

if TYPE_CHECKING:
    import numpy as np

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXACT = {dtype: name for name, dtype in DTYPES.items()}


def exact_type(lm: LM) -> str:
    """Returns the GGUF type that holds the model's weights exactly."""
    return _EXACT.get(lm.model.dtype, "F32")


def export(lm: LM, path: Path | str, dtype: str = "F32") -> dict[str, Any]:
    """Writes `path` with matrices as `dtype` (F32, F16 or BF16) and vectors as F32; returns notes on the tokenizer.

    Raises:
        UserError: llama.cpp has no architecture for the model, or a weight is too large for F16.
        MissingExtra: gguf is not installed.
    """
    require("gguf")
    import gguf

    from winnow.model.gguf import vocabulary

    config = lm.model.config
    names = architectures.TensorNames(config)
    weights = [(names[name], tensor.detach()) for name, tensor in lm.model.named_parameters()]
    factors = architectures.rope_factors(config)
    if factors is not None:
        weights.append(("rope_freqs.weight", factors))
    rows = lm.model.get_input_embeddings().weight.shape[0]

    with contextlib.closing(gguf.GGUFWriter(path, architectures.family_of(config).architecture)) as writer:
        writer.add_name(lm.name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architectures.add_keys(writer, config, rows)
        notes = vocabulary.write_vocabulary(writer, lm.tokenizer, rows)
        for name, tensor in weights:
            kind = _kind(tensor, dtype)
            as_numpy, size = _array(torch.empty(0, dtype=DTYPES[kind])).dtype, tensor.numel() * DTYPES[kind].itemsize
            writer.add_tensor_info(name, list(tensor.shape), as_numpy, size, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in weights:
            stored = architectures.to_gguf(name, tensor, config).to(DTYPES[_kind(tensor, dtype)])
            if stored.dtype == torch.float16 and not stored.isfinite().all():
                raise UserError(
                    f"method.gguf.dense=F16: {name} holds values that F16 cannot; take method.gguf.dense=BF16"
                )
            writer.write_tensor_data(_array(stored))
    return notes


def _kind(tensor: torch.Tensor, dtype: str) -> str:
    return dtype if tensor.ndim > 1 else "F32"  # llama.cpp computes with vectors in single precision


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.contiguous().cpu()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
    return bits.numpy()
