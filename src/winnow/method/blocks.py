"""Iterates over the decoder blocks of a model and gives each block's calibration inputs.

Every block receives the outputs of the (already compressed) blocks before it, so that a method sees the activations that the
compressed model will really have. The model stays in main memory; one block at a time is on the device, with one batch of its
inputs. Main memory holds the calibration inputs of one block. With a checkpoint (`winnow.method.checkpoint`) an interrupted
iteration continues at the block that it had reached.

Weights keep the type that they are stored in. Only during computation a block, or the part of the model outside the blocks,
has the type that the device computes fastest (`Run.compute_dtype`), if that is wider.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.hardware.run import Run
from winnow.model.layers import decoder_blocks, linears_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.method.checkpoint import Checkpoint


ExtraArgs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block other than the hidden states


def compute_dtype(model: PreTrainedModel, run: Run) -> torch.dtype:
    """Returns the type in which blocks are computed: the fastest on the device, but never narrower than the weights.

    A GPU computes both 16-bit types equally fast, so weights in either of them keep their type.
    """
    stored: torch.dtype = model.dtype
    fastest: torch.dtype = getattr(torch, run.compute_dtype)
    if run.device != "cpu" and stored.itemsize == fastest.itemsize:
        return stored
    return torch.promote_types(stored, fastest)


@contextlib.contextmanager
def block_on_device(block: nn.Module, device: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Moves `block` to `device` with its floating-point weights in `dtype`, and restores device and type on exit.

    On exit, changed weights are rounded to the type that the block had before. The yielded function rounds them at once, so
    that the block computes with the weights that it will have.
    """
    first = next(block.parameters())
    home, main, stored = first.device, first.dtype, {name: p.dtype for name, p in block.named_parameters()}

    def cast(narrow: bool) -> None:
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point():  # a method may have added parameters
                parameter.data = parameter.data.to(stored.get(name, main) if narrow else dtype)

    def round_weights() -> None:
        cast(narrow=True)
        cast(narrow=False)

    try:
        block.to(device)
        cast(narrow=False)
        yield round_weights
    finally:
        cast(narrow=True)
        block.to(home)


@contextlib.contextmanager
def cast_outside_blocks(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Casts embeddings, final norm and head to `dtype`, and restores the same tensors on exit."""
    inside = {id(p) for p in decoder_blocks(model).parameters()}
    before = [(p, p.data) for p in model.parameters() if id(p) not in inside and p.is_floating_point()]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@torch.no_grad()
def iterate_blocks(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], run: Run, checkpoint: Checkpoint | None = None
) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
    """Yields for each block its index, the block on the run's device, and `run_calibration`.

    `run_calibration()` runs all calibration batches through the block. A method registers hooks, calls it, and changes the
    block before the next iteration. `run_calibration(on_output)` calls `on_output(index of the batch, output [rows, T,
    hidden])` for each batch. The function is valid only until the next block.

    With a checkpoint, the blocks that an earlier run finished are restored and skipped; anything else that a method remembers
    about them belongs into `checkpoint.state`.
    """
    blocks, dtype = decoder_blocks(model), compute_dtype(model, run)
    home = next(model.parameters()).device
    hidden, extra_args = block_inputs(model, blocks, [batch.to(home) for batch in batches], dtype)
    if getattr(model.config, "num_kv_shared_layers", None):
        checkpoint = None  # later blocks read keys and values that earlier blocks compute
    done = checkpoint.done if checkpoint else 0
    if checkpoint and done:
        hidden = [state.to(home) for state in checkpoint.restore(blocks)]
    for index, block in list(enumerate(blocks))[done:]:
        outputs = functools.partial(block_outputs, block, hidden, extra_args[index], run.device)
        with block_on_device(block, run.device, dtype) as round_weights:
            yield index, block, functools.partial(_run_batches, outputs)
            if index == len(blocks) - 1:
                return  # no block needs the output of the last one
            round_weights()
            for number, output in enumerate(outputs()):
                hidden[number] = output.to(home)
        if checkpoint:
            checkpoint.save(blocks, index + 1, hidden)


@torch.no_grad()
def block_outputs(
    block: nn.Module, hidden: Sequence[torch.Tensor], extra_args: Sequence[ExtraArgs], device: str
) -> Iterator[torch.Tensor]:
    """Yields the block's output [rows, T, hidden] for each batch."""
    for state, extras in zip(hidden, extra_args, strict=True):
        yield block_output(block, state, extras, device)


def block_output(block: nn.Module, state: torch.Tensor, extras: ExtraArgs, device: str) -> torch.Tensor:
    """Returns the block's output on `device` for one batch of hidden states [rows, T, hidden]; gradients pass through."""
    args, kwargs = extras
    result = block(state.to(device), *_to(args, device), **_to(kwargs, device))
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _run_batches(
    outputs: Callable[[], Iterator[torch.Tensor]],
    on_output: Callable[[int, torch.Tensor], None] = lambda number, output: None,
) -> None:
    for number, output in enumerate(outputs()):
        on_output(number, output)


def block_inputs(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[list[ExtraArgs]]]:
    """Returns the hidden states [rows, T, hidden] that enter the first block, and each block's other arguments, by batch.

    All are computed in `dtype`.

    The arguments are recorded for each block: masks and rotary embeddings may alternate from layer to layer (Gemma).
    """
    hidden: list[torch.Tensor] = []
    extra_args: list[list[ExtraArgs]] = [[] for _ in blocks]

    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            state: torch.Tensor = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(state)
            extra_args[index].append((args[1:], kwargs))
            if index == len(blocks) - 1:
                raise _StopForward  # before the final norm, and before the head where `base_model` is the whole model
            return state

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)  # type: ignore[method-assign]
        with cast_outside_blocks(model, dtype):
            for batch in batches:
                with contextlib.suppress(_StopForward):
                    model.base_model(input_ids=batch, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return hidden, extra_args


@torch.no_grad()
def returns_tuple(model: PreTrainedModel) -> bool:
    """Returns whether the blocks return a tuple, whose first item the model uses, as in some architectures."""
    is_tuple = False

    def check_output(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal is_tuple
        is_tuple = isinstance(output, tuple)
        raise _StopForward

    handle = decoder_blocks(model)[0].register_forward_hook(check_output)
    try:
        with contextlib.suppress(_StopForward):
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return is_tuple


class _StopForward(Exception):
    """Ends a forward pass early, when its remaining layers are not needed."""


def input_sums(
    block: nn.Module,
    run_calibration: Callable[[], None],
    start: Callable[[nn.Linear], torch.Tensor],
    add: Callable[[torch.Tensor, torch.Tensor], None],
) -> list[tuple[list[nn.Linear], torch.Tensor]]:
    """Accumulates sums over the inputs of a block's linear layers in one calibration run.

    A sum begins as `start(linear)`; `add(sum, x [tokens, in])` updates it in place. Layers that read the same tensor, as query,
    key and value do, are grouped and share one sum. The sum of a layer that no token reaches stays `start(linear)`.
    """
    linears = list(linears_in(block).values())
    leaders: dict[nn.Linear, nn.Linear] = {}  # for each layer, the first layer that read the same tensor
    sums: dict[nn.Linear, torch.Tensor] = {}
    latest: list[tuple[torch.Tensor, nn.Linear]] = []

    def add_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        same = bool(latest) and latest[0][0] is args[0]
        if leaders.setdefault(module, latest[0][1] if same else module) is module:
            latest[:] = [(args[0], module)]
            if module not in sums:
                sums[module] = start(module)
            add(sums[module], args[0].flatten(0, -2).float())

    handles = [linear.register_forward_pre_hook(add_input) for linear in linears]
    try:
        run_calibration()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[nn.Linear, list[nn.Linear]] = {}
    for linear in linears:
        groups.setdefault(leaders.get(linear, linear), []).append(linear)
    return [(members, sums[leader] if leader in sums else start(leader)) for leader, members in groups.items()]


def _to(value: Any, device: str) -> Any:
    """Moves the tensors in nested tuples, lists and dicts to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
