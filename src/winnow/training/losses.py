"""Computes losses over the vocabulary without storing the full logits.

At 128 thousand tokens of vocabulary the logits of 4,096 positions are 2 GB in single precision, and the backward pass of a plain
loss stores three such arrays. `chunked` takes the last hidden states instead, computes the logits of some positions at a time,
and computes their gradient at once, so that it stores only a gradient as large as the hidden states. Nothing is computed twice,
because a loss is a sum over positions, and the backward pass only scales its gradient by one number.

The losses here are pure functions of logits [N, V] in single precision; each returns the sum over its N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from winnow.estimate.training_memory import LOGITS_BYTES

CHUNK_BYTES = LOGITS_BYTES  # logits at a time, in single precision; memory estimates use it, too

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Head:
    """The output head, which computes logits from the last hidden states.

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        scale: factor of the logits (Granite, Cohere).
        softcap: soft cap of the logits (Gemma-2: arXiv:2408.00118, section 2), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        """Returns the logits [N, V] of hidden states [N, H], in single precision."""
        return self.finish(F.linear(hidden_nh.to(self.weight.dtype), self.weight, self.bias))

    def finish(self, raw_nv: torch.Tensor) -> torch.Tensor:
        """Casts the raw logits to single precision, and applies scale and soft cap."""
        logits_nv = raw_nv.float()
        if self.scale != 1.0:
            logits_nv = logits_nv * self.scale
        if self.softcap is not None:
            logits_nv = self.softcap * torch.tanh(logits_nv / self.softcap)
        return logits_nv


def head_of(model: Any) -> Head:
    """Returns the head of a causal language model of transformers."""
    linear: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)


def cross_entropy(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_nv, targets_n, reduction="sum")


def cross_entropy_gradient(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `cross_entropy` and its gradient softmax(logits) - onehot(targets), which overwrites the logits."""
    targets_n1 = targets_n[:, None]
    chosen_n1, top_n1 = logits_nv.gather(1, targets_n1), logits_nv.max(-1, keepdim=True).values
    sums_n1 = logits_nv.sub_(top_n1).exp_().sum(-1, keepdim=True)
    value = (sums_n1.log() + top_n1 - chosen_n1).sum()
    logits_nv.div_(sums_n1)
    return value, logits_nv.scatter_add_(1, targets_n1, logits_nv.new_full((1, 1), -1.0).expand_as(targets_n1))


def forward_kl(student_nv: torch.Tensor, teacher_nv: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns T^2 KL(p || q), where p is the teacher's distribution (Hinton et al. 2015, arXiv:1503.02531, section 2.1)."""
    q, p = ((x / temperature).log_softmax(-1) for x in (student_nv, teacher_nv))
    return temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)


def reverse_kl(student_nv: torch.Tensor, teacher_nv: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns T^2 KL(q || p), which favors tokens that the teacher finds likely (Gu et al. 2023, arXiv:2306.08543, eq. 1)."""
    q, p = ((x / temperature).log_softmax(-1) for x in (student_nv, teacher_nv))
    return temperature**2 * F.kl_div(p, q, reduction="sum", log_target=True)


def jensen_shannon(
    student_nv: torch.Tensor, teacher_nv: torch.Tensor, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """Returns T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q.

    This is the generalised Jensen-Shannon divergence of Agarwal et al. 2023, arXiv:2306.13649, eq. 1.
    """
    q, p = ((x / temperature).log_softmax(-1) for x in (student_nv, teacher_nv))
    log = p.new_tensor([beta, 1 - beta]).log()
    m = torch.logaddexp(p + log[0], q + log[1])
    to_teacher, to_student = (F.kl_div(m, x, reduction="sum", log_target=True) for x in (p, q))
    return temperature**2 * (beta * to_teacher + (1 - beta) * to_student)


def sampled_kl(
    student_nv: torch.Tensor, ids_nk: torch.Tensor, shares_nk: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Returns T^2 sum -share log q(id), an estimate of `forward_kl` without the teacher's entropy from an unbiased sample.

    Its expected gradient is that of the full distribution (Anshumann et al. 2025, arXiv:2503.16870, section 4).
    `shares_nk` sum to 1 over the samples of a position; samples of share 0 are padding.
    """
    q = (student_nv / temperature).log_softmax(-1)
    return -(temperature**2) * (shares_nk * q.gather(-1, ids_nk)).sum()


def mixed(
    logits_nv: torch.Tensor, targets_n: torch.Tensor, *teacher: torch.Tensor, divergence: Loss, alpha: float
) -> torch.Tensor:
    """Returns (1 - alpha) times a teacher divergence plus alpha times the cross entropy (Hinton et al. 2015, section 2)."""
    if alpha == 0:
        return divergence(logits_nv, *teacher)
    if alpha == 1:
        return cross_entropy(logits_nv, targets_n)
    return (1 - alpha) * divergence(logits_nv, *teacher) + alpha * cross_entropy(logits_nv, targets_n)


class _Chunked(torch.autograd.Function):
    """Sums `loss` over chunks of positions; the forward pass computes the gradients, and the backward pass scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        loss: Loss,
        finish: Callable[[torch.Tensor], torch.Tensor] | None,
        size: int,
        hidden_nh: torch.Tensor,
        weight_vh: torch.Tensor,
        bias_v: torch.Tensor | None,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad
        cast = _autocast_dtype(hidden_nh, weight_vh)
        weight = weight_vh.detach().to(cast)
        bias = bias_v.detach().to(cast) if bias_v is not None else None
        grad_hidden = torch.empty_like(hidden_nh) if needs_grad[3] else None
        grad_weight = torch.zeros_like(weight_vh) if needs_grad[4] else None
        grad_bias = torch.zeros_like(bias_v) if needs_grad[5] and bias_v is not None else None
        total = hidden_nh.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_nh.shape[0], size):
            part = slice(start, start + size)
            h = hidden_nh[part].detach().to(cast)
            with torch.autocast(h.device.type, enabled=False):
                raw = F.linear(h, weight, bias)
                if loss is cross_entropy and finish is None:  # avoids autograd's passes over the logits
                    value, grad_raw = cross_entropy_gradient(raw.float(), inputs[0][part])
                    grad_raw = grad_raw.to(cast)
                    total += value
                else:
                    with torch.enable_grad():
                        raw.requires_grad_()
                        value = loss(finish(raw) if finish else raw.float(), *(x[part] for x in inputs))
                    total += value.detach()
                    if any(needs_grad):
                        (grad_raw,) = torch.autograd.grad(value, raw)
                if not any(needs_grad):
                    continue
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_raw @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    if grad_weight.dtype == cast:
                        grad_weight.addmm_(grad_raw.mT, h)
                    else:
                        grad_weight += grad_raw.mT @ h
                if grad_bias is not None:
                    grad_bias += grad_raw.sum(0).to(grad_bias.dtype)
            del raw, value, grad_raw
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.input_count = len(inputs)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grads = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors]
        return None, None, None, *grads, *([None] * ctx.input_count)


def _autocast_dtype(hidden_nh: torch.Tensor, weight_vh: torch.Tensor) -> torch.dtype:
    kind = hidden_nh.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_vh.dtype


def chunked(
    loss: Loss, hidden_nh: torch.Tensor, head: Head, *inputs: torch.Tensor, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Returns the sum of `loss(logits [c, V], *inputs [c, ...])` over chunks of positions, of at most `chunk_bytes` of logits.

    The sum is differentiable in the hidden states and the head but not in `inputs`, and only once.
    """
    size = max(1, chunk_bytes // (4 * head.weight.shape[0]))
    finish = None if head.scale == 1.0 and head.softcap is None else head.finish
    total: torch.Tensor = _Chunked.apply(loss, finish, size, hidden_nh, head.weight, head.bias, *inputs)
    return total


def unchunked(loss: Loss, hidden_nh: torch.Tensor, head: Head, *inputs: torch.Tensor) -> torch.Tensor:
    """Computes the result of `chunked` from all logits at once."""
    return loss(head(hidden_nh), *inputs)
