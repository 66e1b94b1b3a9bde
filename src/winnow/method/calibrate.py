"""Calibration: token batches from the training split, and a walk over the decoder blocks with the inputs of each.

The walk feeds every block what the (already compressed) blocks before it put out, so that a method sees the activations
that the compressed model will really have, with only one block's inputs held at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.types import LM, Run, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096


def calibration_batches(lm: LM, run: Run) -> tuple[list[torch.Tensor], str]:
    """Token ids [rows, T] of `run.calibration.samples` documents, equal lengths together so that nothing is padded.

    Returns the batches and a SHA-256 over all ids, which the manifest keeps.
    """
    from winnow.recovery.corpus import training_documents
    from winnow.recovery.data import encode

    wanted = run.calibration.samples
    documents = list(itertools.islice(training_documents(run.calibration.source), wanted))
    if not documents:
        raise UserError(f"calibration.source={run.calibration.source} is empty")
    rows = sorted((row.ids for row in encode(documents, lm.tokenizer, run.calibration.max_length)), key=len)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    batches = []
    for length, group in itertools.groupby(rows, key=len):
        size = max(1, BATCH_TOKENS // length)
        same = list(group)
        batches += [torch.tensor(same[i : i + size], device=run.device) for i in range(0, len(same), size)]
    return batches, digest


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a transformers causal LM.

    Raises:
        UserError: the model has no single list of blocks.
    """
    lists = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("layers")]
    if len(lists) != 1:
        raise UserError(f"{type(model).__name__} has {len(lists)} lists of decoder blocks; pruning needs exactly one")
    return lists[0]


class _Stop(Exception):
    """Raised by the hook that has caught the first block's inputs, to spare the rest of the forward."""


@torch.no_grad()
def walk_blocks(
    model: PreTrainedModel, batches: Sequence[torch.Tensor]
) -> Iterator[tuple[int, nn.Module, Callable[[], None]]]:
    """For each block: its index, the block, and `replay()`, which runs all calibration batches through it.

    A method registers hooks, calls `replay`, and changes the block before it asks for the next one.
    """
    blocks = decoder_blocks(model)
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Stop

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(_Stop):
            model(input_ids=batch, use_cache=False)
    handle.remove()
    hidden = [args[0] if args else kwargs["hidden_states"] for args, kwargs in caught]

    def outputs(block: nn.Module) -> Iterator[torch.Tensor]:
        for state, (args, kwargs) in zip(hidden, caught, strict=True):
            others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            result = block(state, *args[1:], **others)
            yield result[0] if isinstance(result, tuple) else result

    for index, block in enumerate(blocks):

        def replay(block: nn.Module = block) -> None:
            for _ in outputs(block):
                pass

        yield index, block, replay
        hidden = list(outputs(block))
