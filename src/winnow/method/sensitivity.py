"""What rounding each linear layer to each width costs the model's predictions, and what a whole recipe costs them.

The cost of one layer is a second-order estimate of the Kullback-Leibler divergence from the model's predictions, in nats a
token: half the mean square of `g . (W' - W) x` over tokens, where x enters the layer, W' is its rounded weight, and g is the
gradient of the log-likelihood of labels drawn from the model's own predictions (with such labels the mean square of a
gradient is the Fisher information, the curvature of that divergence: Martens 2014, arXiv:1412.1193, sections 5 and 9.2;
contributions of different tokens are taken as independent). One backward pass serves all layers and all widths, where trying
each takes a forward pass for each of them; it goes block by block, so only one block need be on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from winnow.method.blocks import (
    Caught,
    block_inputs,
    block_output,
    block_outputs,
    compute_dtype,
    computing,
    outside_blocks,
    puts_out_tuple,
)
from winnow.method.rtn import rtn_scale
from winnow.model.layers import decoder_blocks, linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.hardware.run import Run

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}

Scores = dict[str, dict[int, float]]  # by unit and width


def unit_of(name: str) -> str:
    """The unit that a layer belongs to: those that servers fuse into one matrix (vLLM) must share a width."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{FUSED.get(leaf, leaf)}"


def rounded(weight_oi: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Weights [out, in] as `packing.quantize_linear` leaves them, in their own dtype."""
    scale_og1 = rtn_scale(weight_oi, bits, group_size).to(weight_oi.dtype).float()[..., None]
    groups = weight_oi.float().unflatten(-1, (-1, group_size))
    integers = (groups / scale_og1).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight: torch.Tensor = (integers * scale_og1).flatten(-2).to(weight_oi.dtype)
    return weight


def halves(batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every other row of the batches, and the rest; the batches are sorted by length, so both halves have all lengths."""
    even, odd, seen = [], [], 0
    for batch in batches:
        is_odd = (torch.arange(len(batch)) + seen) % 2 == 1
        even.append(batch[~is_odd])
        odd.append(batch[is_odd])
        seen += len(batch)
    return [b for b in even if len(b)], [b for b in odd if len(b)]


def sensitivities(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    widths: Sequence[int],
    group_size: int,
    run: Run,
) -> Scores:
    """The divergence, in nats a token, that rounding each unit alone to each width causes: an estimate to second order."""
    blocks, device, dtype = decoder_blocks(model), run.device, compute_dtype(model, run)
    home = next(model.parameters()).device
    batches = [batch.to(home) for batch in batches]
    tokens = sum(batch.numel() for batch in batches)
    names = {linear: name for name, linear in linears(model).items()}
    scores: Scores = {unit_of(name): dict.fromkeys(widths, 0.0) for name in names.values()}
    in_tuple = puts_out_tuple(model)
    with _frozen(model):
        states, caught = _forward(model, blocks, batches, device, dtype)
        with outside_blocks(model, dtype):
            gradients = _gradients_of_head(model, blocks, batches, states.pop(), run.seed, in_tuple)
        for index in reversed(range(len(blocks))):
            block = blocks[index]
            with computing(block, device, dtype):
                squares, handles = _watch(block, widths, group_size, model.dtype)
                for number, state in enumerate(states.pop()):
                    leaf = state.to(device).requires_grad_()
                    output = block_output(block, leaf, caught[index][number], device)
                    (gradient,) = torch.autograd.grad(output, leaf, gradients[number].to(device))
                    gradients[number] = gradient.to(home)
                for handle in handles:
                    handle.remove()
            for linear, by_width in squares.items():
                for width, square in by_width.items():
                    scores[unit_of(names[linear])][width] += 0.5 * square.item() / tokens
            run.log(f"mixed: sensitivity of block {index + 1} of {len(blocks)}")
    return scores


def _watch(
    block: nn.Module, widths: Sequence[int], group_size: int, stored: torch.dtype
) -> tuple[dict[nn.Linear, dict[int, torch.Tensor]], list[Any]]:
    """Adds up (g . (W' - W) x)^2 over the tokens that pass through each linear layer, forward and backward.

    W' is W rounded in the type that weights are `stored` in.
    """
    squares: dict[nn.Linear, dict[int, torch.Tensor]] = {}
    handles = []
    for linear in block.modules():
        if not isinstance(linear, nn.Linear):
            continue
        weight = linear.weight.data
        squares[linear] = {width: torch.zeros((), dtype=torch.float64, device=weight.device) for width in widths}
        errors = {width: rounded(weight.to(stored), width, group_size).to(weight) - weight for width in widths}

        def forward(
            module: nn.Linear,
            args: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            errors: dict[int, torch.Tensor] = errors,
        ) -> None:
            entered = args[0].detach()  # [rows, T, in]

            def backward(gradient: torch.Tensor) -> None:
                for width, error in errors.items():
                    change = F.linear(entered, error).float()  # [rows, T, out]
                    squares[module][width] += (gradient.float() * change).sum(-1).square().sum()

            output.register_hook(backward)

        handles.append(linear.register_forward_hook(forward))
    return squares, handles


@torch.no_grad()
def _forward(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], device: str, dtype: torch.dtype
) -> tuple[list[list[torch.Tensor]], list[list[Caught]]]:
    """The hidden states that enter each block, and those that leave the last, all in main memory; what else blocks take."""
    hidden, caught = block_inputs(model, blocks, batches, dtype)
    states, home = [hidden], next(model.parameters()).device
    for block, extras in zip(blocks, caught, strict=True):
        with computing(block, device, dtype):
            states.append([output.to(home) for output in block_outputs(block, states[-1], extras, device)])
    return states, caught


def _gradients_of_head(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    seed: int,
    in_tuple: bool,
) -> list[torch.Tensor]:
    """Of the log-likelihood of labels drawn from the predictions, with respect to what leaves the last block."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for ids, state in zip(batches, states, strict=True):
        rows = []
        for row in range(len(ids)):  # one at a time: logits are wide
            leaf = state[row : row + 1].detach().requires_grad_()
            logits = _logits(model, blocks, ids[row : row + 1], leaf, in_tuple)[0]  # [T, vocabulary]
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            rows.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(torch.cat(rows))
    return gradients


def _logits(
    model: PreTrainedModel, blocks: nn.ModuleList, ids_bt: torch.Tensor, hidden_bth: torch.Tensor, in_tuple: bool
) -> torch.Tensor:
    """Logits [rows, T, vocabulary] of what leaves the last block, by the model's own norm, head and whatever follows.

    `in_tuple`: whether its blocks put out tuples.
    """
    output = (hidden_bth,) if in_tuple else hidden_bth
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
        logits: torch.Tensor = model(input_ids=ids_bt, use_cache=False).logits
        return logits.float()
    finally:
        for block in blocks:
            del block.forward


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile no parameter gathers a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    recipes: Sequence[Mapping[str, int]],
    group_size: int,
    run: Run,
) -> list[float]:
    """How far the predictions move under each recipe (width by name of layer): the exact divergence, in nats a token.

    All recipes walk through the model together, so each block goes to the device once.
    """
    blocks, device, dtype = decoder_blocks(model), run.device, compute_dtype(model, run)
    home = next(model.parameters()).device
    batches = [batch.to(home) for batch in batches]
    names = {linear: name for name, linear in linears(model).items()}
    in_tuple = puts_out_tuple(model)
    hidden, caught = block_inputs(model, blocks, batches, dtype)
    states = [hidden for _ in range(1 + len(recipes))]  # of the model as it is first
    for block, extras in zip(blocks, caught, strict=True):
        inside = [linear for linear in block.modules() if linear in names]
        kept = [linear.weight.data for linear in inside]
        with computing(block, device, dtype):
            for number, recipe in enumerate([None, *recipes]):
                for linear, weight in zip(inside, kept, strict=True):
                    here = weight.to(device)
                    changed = here if recipe is None else rounded(here, recipe[names[linear]], group_size)
                    linear.weight.data = changed.to(dtype)
                states[number] = [output.to(home) for output in block_outputs(block, states[number], extras, device)]
        for linear, weight in zip(inside, kept, strict=True):
            linear.weight.data = weight
    totals = [0.0] * len(recipes)
    with outside_blocks(model, dtype):
        for number, ids in enumerate(batches):
            for row in range(len(ids)):
                base, *others = (
                    _logits(model, blocks, ids[row : row + 1], state[number][row : row + 1], in_tuple).log_softmax(-1)
                    for state in states
                )
                for which, other in enumerate(others):
                    totals[which] += F.kl_div(other, base, reduction="sum", log_target=True).item()
    return [total / sum(batch.numel() for batch in batches) for total in totals]
