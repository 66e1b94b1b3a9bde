"""Group-wise integer weights in the `pack-quantized` format of compressed-tensors, which transformers and vLLM load.

A method chooses scales and attaches them with `quantize_linear`; the weights in memory become exactly what the packed file
will hold, so a model scores the same before it is saved and after it is loaded. `pack` turns them into integers when saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks by name: what compression works on (not the embeddings, not the head)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}."}


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters in place; unlike `model.to(dtype)`, buffers such as RoPE's frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def attach_scheme(model: PreTrainedModel, bits: int, group_size: int) -> None:
    """Declares `bits`-bit symmetric groups along the input dimension for every linear layer of the blocks.

    Raises:
        UserError: `group_size` does not divide the width of a layer.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        disable_quantization,
    )

    for name, linear in linears(model).items():
        if linear.in_features % group_size:
            raise UserError(f"group_size={group_size} does not divide the width {linear.in_features} of {name}")
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in linears(model)]
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=ignored,
        format="pack-quantized",
    )
    apply_quantization_config(model, config, show_progress=False)
    model.apply(disable_quantization)  # the weights hold quantized values themselves; no work is left for the forward


def quantize_linear(linear: Any, scale_og: torch.Tensor) -> None:
    """Rounds the weights to the grid of `scale_og` [out, groups]; keeps integers and scales for packing."""
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    dtype = linear.weight.dtype
    scale_og = scale_og.to(dtype)
    # in single precision: quotients and products in bfloat16 are off by up to half a step of an 8-bit grid
    args, scale = linear.quantization_scheme.weights, scale_og.float()
    linear.integers = quantize(linear.weight.data.float(), scale, None, args, dtype=torch.int8)
    linear.weight.data = dequantize(linear.integers, scale, None, args, dtype=torch.float32).to(dtype)
    linear.weight_scale.data.copy_(scale_og)
    linear.quantization_status = QuantizationStatus.FROZEN


def is_packable(model: nn.Module) -> bool:
    return any(getattr(module, "quantization_scheme", None) is not None for module in model.modules())


def pack(model: PreTrainedModel) -> Any:
    """Packs the integers in place; returns the compressor whose `update_config(folder)` must follow `save_pretrained`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    linear: Any
    for linear in linears(model).values():
        # the compressor rounds the weights again: give it them unrounded, so that the very same integers come out
        args = linear.quantization_scheme.weights
        linear.weight.data = dequantize(linear.integers, linear.weight_scale.float(), None, args, dtype=torch.float32)
        del linear.integers
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor
