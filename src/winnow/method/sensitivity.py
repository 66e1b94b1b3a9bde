"""Measures how rounding changes the model's predictions: estimated for each linear layer and width, exact for whole recipes.

The cost of one layer is a second-order estimate of the Kullback-Leibler divergence from the model's predictions, in nats a
token: half the mean square of `g . (W' - W) x` over tokens, where x is the layer's input, W' is its rounded weight, and g is
the gradient of the log-likelihood of labels sampled from the model's own predictions. With such labels the mean square of a
gradient is the Fisher information, the curvature of that divergence (Martens 2014, arXiv:1412.1193, sections 5 and 9.2;
contributions of different tokens are treated as independent). One backward pass serves all layers and widths; trying them would
take a forward pass for each layer and width. It goes block by block, so that only one block is on the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from winnow.method.blocks import (
    ExtraArgs,
    block_inputs,
    block_on_device,
    block_output,
    block_outputs,
    cast_outside_blocks,
    compute_dtype,
    returns_tuple,
)
from winnow.method.rtn import rtn_scale
from winnow.model.layers import decoder_blocks, linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.hardware.run import Run

logger = logging.getLogger(__name__)

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}

Scores = dict[str, dict[int, float]]  # keys: unit, width


def unit_of(name: str) -> str:
    """Returns the unit of a layer: layers that a server (vLLM) fuses into one matrix form a unit and share a width."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{FUSED.get(leaf, leaf)}"


def round_weights(weight_oi: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Returns the weights [out, in] rounded as by `packing.quantize_linear`, in their own dtype."""
    scale_og1 = rtn_scale(weight_oi, bits, group_size).to(weight_oi.dtype).float()[..., None]
    groups = weight_oi.float().unflatten(-1, (-1, group_size))
    integers = (groups / scale_og1).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight: torch.Tensor = (integers * scale_og1).flatten(-2).to(weight_oi.dtype)
    return weight


def halves(batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Splits the batches into even and odd rows; batches are sorted by length, so both halves have all lengths."""
    even, odd, rows = [], [], 0
    for batch in batches:
        is_odd = (torch.arange(len(batch)) + rows) % 2 == 1
        even.append(batch[~is_odd])
        odd.append(batch[is_odd])
        rows += len(batch)
    return [b for b in even if len(b)], [b for b in odd if len(b)]


def sensitivities(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    widths: Sequence[int],
    group_size: int,
    run: Run,
) -> Scores:
    """Returns the divergence, in nats a token, of rounding one unit to one width: a second-order estimate."""
    blocks, device, dtype = decoder_blocks(model), run.device, compute_dtype(model, run)
    home = next(model.parameters()).device
    batches = [batch.to(home) for batch in batches]
    tokens = sum(batch.numel() for batch in batches)
    names = {linear: name for name, linear in linears(model).items()}
    scores: Scores = {unit_of(name): dict.fromkeys(widths, 0.0) for name in names.values()}
    in_tuple = returns_tuple(model)
    with _frozen(model):
        states, extra_args = _forward(model, blocks, batches, device, dtype)
        with cast_outside_blocks(model, dtype):
            gradients = _gradients_of_head(model, blocks, batches, states.pop(), run.seed, in_tuple)
        for index in reversed(range(len(blocks))):
            block = blocks[index]
            with block_on_device(block, device, dtype):
                squares, handles = _hook_squares(block, widths, group_size, model.dtype)
                for number, state in enumerate(states.pop()):
                    leaf = state.to(device).requires_grad_()
                    output = block_output(block, leaf, extra_args[index][number], device)
                    (gradient,) = torch.autograd.grad(output, leaf, gradients[number].to(device))
                    gradients[number] = gradient.to(home)
                for handle in handles:
                    handle.remove()
            for linear, by_width in squares.items():
                for width, square in by_width.items():
                    scores[unit_of(names[linear])][width] += 0.5 * square.item() / tokens
            logger.info(f"mixed: sensitivity of block {index + 1} of {len(blocks)}")
    return scores


def _hook_squares(
    block: nn.Module, widths: Sequence[int], group_size: int, stored: torch.dtype
) -> tuple[dict[nn.Linear, dict[int, torch.Tensor]], list[Any]]:
    """Registers hooks that sum (g . (W' - W) x)^2 over the tokens of forward and backward; returns the sums and the hooks.

    W' is W rounded in the type that weights are `stored` in.
    """
    squares: dict[nn.Linear, dict[int, torch.Tensor]] = {}
    handles = []
    for linear in block.modules():
        if not isinstance(linear, nn.Linear):
            continue
        weight = linear.weight.data
        squares[linear] = {width: torch.zeros((), dtype=torch.float64, device=weight.device) for width in widths}
        errors = {width: round_weights(weight.to(stored), width, group_size).to(weight) - weight for width in widths}

        def forward(
            module: nn.Linear,
            args: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            errors: dict[int, torch.Tensor] = errors,
        ) -> None:
            inputs = args[0].detach()  # [rows, T, in]

            def backward(gradient: torch.Tensor) -> None:
                for width, error in errors.items():
                    change = F.linear(inputs, error).float()  # [rows, T, out]
                    squares[module][width] += (gradient.float() * change).sum(-1).square().sum()

            output.register_hook(backward)

        handles.append(linear.register_forward_hook(forward))
    return squares, handles


@torch.no_grad()
def _forward(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], device: str, dtype: torch.dtype
) -> tuple[list[list[torch.Tensor]], list[list[ExtraArgs]]]:
    """Returns the inputs of each block and the outputs of the last, in main memory, and the blocks' other arguments."""
    hidden, extra_args = block_inputs(model, blocks, batches, dtype)
    states, home = [hidden], next(model.parameters()).device
    for block, extras in zip(blocks, extra_args, strict=True):
        with block_on_device(block, device, dtype):
            states.append([output.to(home) for output in block_outputs(block, states[-1], extras, device)])
    return states, extra_args


def _gradients_of_head(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    seed: int,
    in_tuple: bool,
) -> list[torch.Tensor]:
    """Returns the gradients of the log-likelihood of sampled labels with respect to the last block's outputs."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for ids, state in zip(batches, states, strict=True):
        rows = []
        for row in range(len(ids)):  # one row at a time: logits are large
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
    """Returns the logits [rows, T, vocabulary] for outputs of the last block, by the model's own norm and head.

    `in_tuple`: whether its blocks return tuples.
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
    """Turns off gradients of all parameters, and restores them on exit."""
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
    """Returns the exact divergence of the predictions under each recipe (layer name -> width), in nats a token.

    All recipes pass through the model together, so that each block moves to the device once.
    """
    blocks, device, dtype = decoder_blocks(model), run.device, compute_dtype(model, run)
    home = next(model.parameters()).device
    batches = [batch.to(home) for batch in batches]
    names = {linear: name for name, linear in linears(model).items()}
    in_tuple = returns_tuple(model)
    hidden, extra_args = block_inputs(model, blocks, batches, dtype)
    states = [hidden for _ in range(1 + len(recipes))]  # index 0: the unrounded model
    for block, extras in zip(blocks, extra_args, strict=True):
        inside = [linear for linear in block.modules() if linear in names]
        originals = [linear.weight.data for linear in inside]
        with block_on_device(block, device, dtype):
            for number, recipe in enumerate([None, *recipes]):
                for linear, weight in zip(inside, originals, strict=True):
                    original = weight.to(device)
                    changed = original if recipe is None else round_weights(original, recipe[names[linear]], group_size)
                    linear.weight.data = changed.to(dtype)
                states[number] = [output.to(home) for output in block_outputs(block, states[number], extras, device)]
        for linear, weight in zip(inside, originals, strict=True):
            linear.weight.data = weight
    totals = [0.0] * len(recipes)
    with cast_outside_blocks(model, dtype):
        for number, ids in enumerate(batches):
            for row in range(len(ids)):
                base, *rounded_models = (
                    _logits(model, blocks, ids[row : row + 1], state[number][row : row + 1], in_tuple).log_softmax(-1)
                    for state in states
                )
                for candidate, log_probs in enumerate(rounded_models):
                    totals[candidate] += F.kl_div(log_probs, base, reduction="sum", log_target=True).item()
    return [total / sum(batch.numel() for batch in batches) for total in totals]
