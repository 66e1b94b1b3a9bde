"""Stores group-wise integer weights in the `pack-quantized` format of compressed-tensors, which transformers and vLLM load.

A method chooses scales and attaches them with `quantize_linear`. The weights in memory then equal those in the packed file, so
that a model scores the same before it is saved and after it is loaded. `pack` turns them into integers when the model is saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.core.errors import UserError
from winnow.model.layers import linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_SIZES = (32, 64, 128)  # group sizes that methods offer
_NOT_LOADABLE = {"GPTBigCodeForCausalLM"}
ROWS = 128  # rows per step: rounding and packing take several times the memory of their input


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters in place; unlike `model.to(dtype)`, buffers such as RoPE's frequencies keep their precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def set_product_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the compute dtype of bitsandbytes' 4-bit layers, which overrides their configuration; the weights do not change."""
    module: Any
    for module in model.modules():
        if getattr(module, "compute_type_is_set", None) is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True


@contextlib.contextmanager
def compute_in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Casts frozen unquantized weights and the compute dtype of quantized layers to `dtype` inside the block."""
    frozen = [(p, p.data) for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    quantized_layers: list[tuple[Any, Any]] = [
        (m, m.compute_dtype) for m in model.modules() if hasattr(m, "compute_dtype")
    ]
    try:
        for parameter, data in frozen:
            parameter.data = data.to(dtype)
        set_product_dtype(model, dtype)
        yield
    finally:
        for parameter, data in frozen:
            parameter.data = data.to(parameter.device)
        for module, original_dtype in quantized_layers:
            module.compute_dtype = original_dtype


def check_loadable(architecture: str) -> None:
    """Raises UserError for an architecture whose packed layers transformers cannot load."""
    if architecture in _NOT_LOADABLE:
        raise UserError(
            f"transformers looks for weights in the packed layers of {architecture} and cannot load it; take method=[nf4] or [int8]"
        )


def check_groups(model: nn.Module, group_size: int) -> None:
    """Raises UserError if `group_size` does not divide the width of a linear layer of the blocks, or none can be packed."""
    check_loadable(type(model).__name__)
    widths = {name: linear.in_features for name, linear in linears(model).items()}
    for name, width in widths.items():
        if width % group_size:
            raise group_size_error(group_size, name, width, widths.values())


def group_size_error(group_size: int, name: str, width: int, widths: Iterable[int]) -> UserError:
    """Returns the error for a group size that does not divide the width of layer `name`; it names the nearest valid size."""
    common = math.gcd(*widths)
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    nearest = min(fitting, key=lambda size: abs(size - group_size), default=None)
    way_out = f"take group_size={nearest}" if nearest else "take a method without groups, such as nf4 or int8"
    return UserError(f"group_size={group_size} does not divide the width {width} of {name}; {way_out}")


def attach_scheme(model: PreTrainedModel, bits: int | Mapping[str, int], group_size: int) -> None:
    """Declares symmetric groups along the input dimension for every linear layer of the blocks.

    Args:
        bits: the bit width of all layers, or of each layer by name; each width then is one group of the configuration.

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

    check_groups(model, group_size)
    matrices = linears(model)
    if isinstance(bits, int):
        targets = {bits: ["Linear"]}
    else:
        targets = {width: [n for n in matrices if bits[n] == width] for width in sorted(set(bits.values()))}
    groups = {}
    for number, (width, layers) in enumerate(targets.items()):
        weights = QuantizationArgs(num_bits=width, type="int", symmetric=True, strategy="group", group_size=group_size)
        groups[f"group_{number}"] = QuantizationScheme(targets=layers, weights=weights)
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in matrices]
    config = QuantizationConfig(config_groups=groups, ignore=ignored, format="pack-quantized")
    apply_quantization_config(model, config, show_progress=False)
    # the weights already hold quantized values, so that the forward pass has nothing to quantize
    model.apply(disable_quantization)


def round_to_grid(weight_oi: torch.Tensor, scale: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the integers (or 8-bit floats) that weights round to on the grid of `scale`, and their dequantized values.

    The scales may be per group [out, groups], per row [out, 1] or per block [rows, columns], as `args` says.
    """
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    integers, values = [], []
    height = args.block_structure[0] if args.block_structure else 1  # rows of weights that share a row of scales
    for rows, scales in zip(weight_oi.split(ROWS), scale.float().split(ROWS // height), strict=True):
        # single precision: in bfloat16, quotients and products are off by up to half a step of an 8-bit grid
        integers.append(quantize(rows.float(), scales, None, args, dtype=args.pytorch_dtype()))
        values.append(dequantize(integers[-1], scales, None, args, dtype=torch.float32).to(weight_oi.dtype))
    return torch.cat(integers), torch.cat(values)


def quantize_linear(linear: Any, scale_og: torch.Tensor) -> None:
    """Rounds the weights to the grid of `scale_og` [out, groups]; keeps integers and scales for packing."""
    from compressed_tensors.quantization import QuantizationStatus

    scale_og = scale_og.to(linear.weight.dtype)
    args = linear.quantization_scheme.weights
    linear.integers, linear.weight.data = round_to_grid(linear.weight.data, scale_og, args)
    linear.weight_scale.data.copy_(scale_og)
    linear.quantization_status = QuantizationStatus.FROZEN


def is_packable(model: nn.Module) -> bool:
    """Returns whether a layer of the model has a quantization scheme."""
    return any(getattr(module, "quantization_scheme", None) is not None for module in model.modules())


def pack(model: PreTrainedModel) -> Any:
    """Packs the weights in place; returns the compressor whose `update_config(folder)` must be called after `save_pretrained`.

    Layers without `integers` hold values on the grid of their scale, from which the integers are computed again. The integers are
    stored without the library's own compressors, which would round the values once more, in the model's dtype.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict

    compressor = ModelCompressor.from_pretrained_model(model)  # also sets the format of each layer
    linear: Any
    for linear in linears(model).values():
        scheme = linear.quantization_scheme
        tensors = get_direct_state_dict(linear)
        weight = tensors.pop("weight")
        tensors.pop("weight_zero_point", None)  # quantization is symmetric
        integers = vars(linear).pop("integers", None)
        if integers is None:
            integers, _ = round_to_grid(weight.data, linear.weight_scale.data, scheme.weights)
        if scheme.format == "pack-quantized":
            parts = [pack_to_int32(rows, scheme.weights.num_bits) for rows in integers.split(ROWS)]
            tensors |= {"weight_packed": torch.cat(parts), "weight_shape": torch.tensor(weight.shape)}
        else:
            tensors["weight"] = integers
        replace_direct_state_dict(linear, tensors)
        linear.quantization_status = QuantizationStatus.COMPRESSED
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    return compressor
