"""A walk over the decoder blocks with the inputs of each.

The walk feeds every block what the (already compressed) blocks before it put out, so that a method sees the activations
that the compressed model will really have. The model stays in main memory: one block at a time is on the device, with one
batch of its inputs; of the calibration batches the inputs of one block are held in main memory. With a checkpoint
(`winnow.method.checkpoint`) a walk that died goes on at the block it had reached.

The weights keep the type that they are stored in. Only while something is computed is a block, or what lies outside of the
blocks, in the type that the device computes fastest (`Run.compute_dtype`), if that is wider.
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


Caught = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block other than the hidden states


def compute_dtype(model: PreTrainedModel, run: Run) -> torch.dtype:
    """The type in which blocks of `model` are computed: what is fastest on the device, but never narrower than the weights.

    A GPU computes both 16-bit types equally fast, so that weights in one of them stay as they are.
    """
    stored: torch.dtype = model.dtype
    fastest: torch.dtype = getattr(torch, run.compute_dtype)
    if run.device != "cpu" and stored.itemsize == fastest.itemsize:
        return stored
    return torch.promote_types(stored, fastest)


@contextlib.contextmanager
def computing(block: nn.Module, device: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Meanwhile `block` is on `device` with its floating-point weights in `dtype`; then it is back as it came.

    What a method has changed meanwhile is rounded to the type that the block's weights came in; calling what is yielded does
    that at once, so that the block computes with the weights that it will have.
    """
    first = next(block.parameters())
    home, main, stored = first.device, first.dtype, {name: p.dtype for name, p in block.named_parameters()}

    def cast(narrow: bool) -> None:
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point():  # a method may have put in parameters that were not there before
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
def outside_blocks(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile embeddings, norms and head are in `dtype`; then they are the very tensors that they were."""
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
    """For each block: its index, the block on the run's device, and `replay()`, which runs all calibration batches through it.

    A method registers hooks, calls `replay`, and changes the block before it asks for the next one. `replay(see)` calls
    `see(index of the batch, output [rows, T, hidden])` for each batch. It ends with its block: the next has another.

    With a checkpoint the blocks that an earlier run finished are put into place and not walked again; whatever a method
    keeps of them beside their weights belongs into `checkpoint.state`.
    """
    blocks, dtype = decoder_blocks(model), compute_dtype(model, run)
    home = next(model.parameters()).device
    hidden, caught = block_inputs(model, blocks, [batch.to(home) for batch in batches], dtype)
    if getattr(model.config, "num_kv_shared_layers", None):
        checkpoint = None  # later blocks read keys and values that only a run through the earlier ones makes
    done = checkpoint.done if checkpoint else 0
    if checkpoint and done:
        hidden = [state.to(home) for state in checkpoint.restore(blocks)]
    for index, block in list(enumerate(blocks))[done:]:
        outputs = functools.partial(block_outputs, block, hidden, caught[index], run.device)
        with computing(block, run.device, dtype) as round_weights:
            yield index, block, functools.partial(_replay, outputs)
            if index == len(blocks) - 1:
                return  # nobody asks for what the last block puts out
            round_weights()
            for number, output in enumerate(outputs()):
                hidden[number] = output.to(home)
        if checkpoint:
            checkpoint.save(blocks, index + 1, hidden)


@torch.no_grad()
def block_outputs(
    block: nn.Module, hidden: Sequence[torch.Tensor], caught: Sequence[Caught], device: str
) -> Iterator[torch.Tensor]:
    for state, extras in zip(hidden, caught, strict=True):
        yield block_output(block, state, extras, device)


def block_output(block: nn.Module, state: torch.Tensor, extras: Caught, device: str) -> torch.Tensor:
    """What the block, on `device`, makes of the hidden states [rows, T, hidden] of one batch; gradients go through."""
    args, kwargs = extras
    result = block(state.to(device), *_to(args, device), **_to(kwargs, device))
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _replay(
    run: Callable[[], Iterator[torch.Tensor]],
    see: Callable[[int, torch.Tensor], None] = lambda number, output: None,
) -> None:
    for number, output in enumerate(run()):
        see(number, output)


def block_inputs(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[list[Caught]]]:
    """The hidden states [rows, T, hidden] that enter the first block, and what else each block is called with, by batch.

    All of it is computed in `dtype`.

    Caught for each block, not for the first alone: masks and rotary embeddings may alternate from layer to layer (Gemma).
    """
    hidden: list[torch.Tensor] = []
    caught: list[list[Caught]] = [[] for _ in blocks]

    def catch(index: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            state: torch.Tensor = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(state)
            caught[index].append((args[1:], kwargs))
            if index == len(blocks) - 1:
                raise _AllCaught  # before the final norm, and the head where `base_model` is the whole model
            return state

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = catch(index)  # type: ignore[method-assign]
        with outside_blocks(model, dtype):
            for batch in batches:
                with contextlib.suppress(_AllCaught):
                    model.base_model(input_ids=batch, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return hidden, caught


@torch.no_grad()
def puts_out_tuple(model: PreTrainedModel) -> bool:
    """Whether the blocks put out a tuple, of which the model takes the first: as those of some architectures do."""
    found = False

    def see(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal found
        found = isinstance(output, tuple)
        raise _AllCaught

    handle = decoder_blocks(model)[0].register_forward_hook(see)
    try:
        with contextlib.suppress(_AllCaught):
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return found


class _AllCaught(Exception):
    """Ends a forward pass whose rest is of no interest."""


def input_sums(
    block: nn.Module,
    replay: Callable[[], None],
    start: Callable[[nn.Linear], torch.Tensor],
    add: Callable[[torch.Tensor, torch.Tensor], None],
) -> list[tuple[list[nn.Linear], torch.Tensor]]:
    """What `add(sum, x [tokens, in])` makes in one replay of `start(linear)` for the inputs of a block's linear layers.

    Layers that read the very same tensor, as query, key and value do, come together and share one sum. One that no token
    reaches keeps what `start` gave.
    """
    linears = list(linears_in(block).values())
    leaders: dict[nn.Linear, nn.Linear] = {}  # of each layer, the first that read the same tensor
    sums: dict[nn.Linear, torch.Tensor] = {}
    latest: list[tuple[torch.Tensor, nn.Linear]] = []

    def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        same = bool(latest) and latest[0][0] is args[0]
        if leaders.setdefault(module, latest[0][1] if same else module) is module:
            latest[:] = [(args[0], module)]
            if module not in sums:
                sums[module] = start(module)
            add(sums[module], args[0].flatten(0, -2).float())

    handles = [linear.register_forward_pre_hook(see) for linear in linears]
    try:
        replay()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[nn.Linear, list[nn.Linear]] = {}
    for linear in linears:
        groups.setdefault(leaders.get(linear, linear), []).append(linear)
    return [(members, sums[leader] if leader in sums else start(leader)) for leader, members in groups.items()]


def _to(value: Any, device: str) -> Any:
    """Tensors in nested tuples, lists and dicts, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
