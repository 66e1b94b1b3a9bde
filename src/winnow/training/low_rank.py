"""Low-rank updates while they are trained: y = W x + s B A x in as few passes over the activations as it takes.

PEFT computes the update in the adapter's single precision: the layer's input is copied there, cast back for both products, and the
result scaled and added in passes of its own, all of which an autograd graph then keeps. Here the update is added by the very
product that makes it, in the type of the layer's output, and the input is kept once for all layers that share it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def in_few_passes(model: nn.Module) -> Iterator[None]:
    """Meanwhile PEFT's plain layers in `model` compute so; those with DoRA, dropout or a forward of their own stay as they are."""
    chosen = [layer for layer in model.modules() if _is_plain(layer)]
    for layer in chosen:
        layer.forward = types.MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    if not hasattr(layer, "lora_A") or "forward" in vars(layer) or list(layer.lora_A) != ["default"]:
        return False
    a, b, dropout = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    usual = all(type(x) is nn.Linear and x.bias is None for x in (a, b)) and type(dropout) is nn.Identity
    return usual and not layer.lora_variant and not layer.merged and not layer.disable_adapters


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = self.base_layer(x, *args, **kwargs)
    # what a quantized layer puts out may be a view, which must not be written to
    in_place = type(self.base_layer) is nn.Linear and out.is_contiguous()
    weights = self.lora_A["default"].weight, self.lora_B["default"].weight
    updated: torch.Tensor = _Updated.apply(out, x, *weights, self.scaling["default"], in_place)
    return updated


class _Updated(torch.autograd.Function):
    """`out + scale * x A^T B^T`, of out [..., O], x [..., I], A [R, I] and B [O, R]."""

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
            # a view that autograd does not know as one: some architectures write to what a layer puts out (Falcon)
            viewed: torch.Tensor = torch.ops.aten._unsafe_view(fresh, out.shape)
            return viewed

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_ti, inner_tr, a_ri, b_or = ctx.saved_tensors
        of_x, of_a, of_b = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            grad_to = grad.reshape(-1, grad.shape[-1]).to(b_or.dtype)
            grad_tr = (grad_to @ b_or).mul_(ctx.scale)
            grad_x = (grad_tr @ a_ri).view(ctx.shape).to(of_x) if ctx.needs_input_grad[1] else None
            grad_a = (grad_tr.mT @ x_ti).to(of_a)
            grad_b = (grad_to.mT @ inner_tr).mul_(ctx.scale).to(of_b)
        return grad, grad_x, grad_a, grad_b, None, None
