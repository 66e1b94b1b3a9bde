"""Computes LoRA layers in training, y = W x + s B A x, with as few passes over the activations as possible.

PEFT computes the update in the adapter's single precision: it casts the layer's input, casts it back for both products, and
scales and adds the result in separate passes, all of which the autograd graph stores. Here one matrix product computes and adds
the update, in the dtype of the layer's output, and the input is stored once for all layers that share it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Replaces the forward of PEFT's plain LoRA layers in `model` inside the context.

    Layers with DoRA, dropout or a custom forward stay unchanged.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    if not hasattr(layer, "lora_A") or "forward" in vars(layer) or list(layer.lora_A) != ["default"]:
        return False
    a, b, dropout = (modules["default"] for modules in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    is_standard = all(type(x) is nn.Linear and x.bias is None for x in (a, b)) and type(dropout) is nn.Identity
    return is_standard and not layer.lora_variant and not layer.merged and not layer.disable_adapters


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = self.base_layer(x, *args, **kwargs)
    # the output of a quantized layer may be a view, which must not be modified in place
    in_place = type(self.base_layer) is nn.Linear and out.is_contiguous()
    weights = self.lora_A["default"].weight, self.lora_B["default"].weight
    updated: torch.Tensor = _AddUpdate.apply(out, x, *weights, self.scaling["default"], in_place)
    return updated


class _AddUpdate(torch.autograd.Function):
    """Computes `out + scale * x A^T B^T` from out [..., O], x [..., I], A [R, I] and B [O, R]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        a_ri: torch.Tensor,
        b_or: torch.Tensor,
        scale: float,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a_ri.dtype, b_or.dtype)
        x_ti = x.to(out.dtype).reshape(-1, x.shape[-1])
        a_ri, b_or = a_ri.to(out.dtype), b_or.to(out.dtype)
        with torch.autocast(out.device.type, enabled=False):
            inner_tr = x_ti @ a_ri.mT
            ctx.save_for_backward(x_ti, inner_tr, a_ri, b_or)
            if in_place:
                out.view(-1, out.shape[-1]).addmm_(inner_tr, b_or.mT, alpha=scale)
                ctx.mark_dirty(out)
                return out
            fresh = torch.addmm(out.reshape(-1, out.shape[-1]), inner_tr, b_or.mT, alpha=scale)
            # autograd must not see this as a view, because some architectures modify a layer's output in place (Falcon)
            viewed: torch.Tensor = torch.ops.aten._unsafe_view(fresh, out.shape)
            return viewed

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_ti, inner_tr, a_ri, b_or = ctx.saved_tensors
        dtype_x, dtype_a, dtype_b = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            grad_to = grad.reshape(-1, grad.shape[-1]).to(b_or.dtype)
            grad_tr = (grad_to @ b_or).mul_(ctx.scale)
            grad_x = (grad_tr @ a_ri).view(ctx.shape).to(dtype_x) if ctx.needs_input_grad[1] else None
            grad_a = (grad_tr.mT @ x_ti).to(dtype_a)
            grad_b = (grad_to.mT @ inner_tr).mul_(ctx.scale).to(dtype_b)
        return grad, grad_x, grad_a, grad_b, None, None
