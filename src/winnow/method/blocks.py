"""A walk over the decoder blocks with the inputs of each.

The walk feeds every block what the (already compressed) blocks before it put out, so that a method sees the activations
that the compressed model will really have. The model stays in main memory: one block at a time is on the device, and of the
calibration batches the inputs of one block are held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a transformers causal LM.

    Raises:
        UserError: the model has no single list of blocks.
    """
    lists = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("layers")]
    if len(lists) != 1:
        raise UserError(f"{type(model).__name__} has {len(lists)} lists of decoder blocks; it takes exactly one")
    return lists[0]


Caught = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block other than the hidden states


@torch.no_grad()
def walk_blocks(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], device: str = "cpu"
) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
    """For each block: its index, the block on `device`, and `replay()`, which runs all calibration batches through it.

    A method registers hooks, calls `replay`, and changes the block before it asks for the next one. `replay(see)` calls
    `see(index of the batch, output [rows, T, hidden])` for each batch.
    """
    blocks = decoder_blocks(model)
    home = next(model.parameters()).device
    hidden, caught = _inputs(model, blocks, [batch.to(home) for batch in batches])
    for index, block in enumerate(blocks):
        block.to(device)

        run = functools.partial(_outputs, block, hidden, caught[index], device)
        yield index, block, functools.partial(_replay, run)
        hidden = [output.to(home) for output in run()]
        block.to(home)


def _outputs(
    block: nn.Module, hidden: Sequence[torch.Tensor], caught: Sequence[Caught], device: str
) -> Iterator[torch.Tensor]:
    for state, (args, kwargs) in zip(hidden, caught, strict=True):
        result = block(state.to(device), *_to(args, device), **_to(kwargs, device))
        yield result[0] if isinstance(result, tuple) else result


def _replay(
    run: Callable[[], Iterator[torch.Tensor]],
    see: Callable[[int, torch.Tensor], None] = lambda number, output: None,
) -> None:
    for number, output in enumerate(run()):
        see(number, output)


def _inputs(
    model: PreTrainedModel, blocks: nn.ModuleList, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[Caught]]]:
    """The hidden states [rows, T, hidden] that enter the first block, and what else each block is called with, by batch.

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
            return state

        return forward

    try:
        for index, block in enumerate(blocks):
            block.forward = catch(index)  # type: ignore[method-assign]
        for batch in batches:
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return hidden, caught


def _to(value: Any, device: str) -> Any:
    """Tensors in nested tuples, lists and dicts, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
