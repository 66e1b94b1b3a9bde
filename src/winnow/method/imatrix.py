"""Computes the importance matrix: the mean square of each input of each linear layer over the calibration data.

llama.cpp weighs the rounding error of each weight with it when it chooses scales. The embedding and the head have no entry, as
in llama.cpp's own tool.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from winnow.hardware.run import Run
from winnow.model.layers import linears_in
from winnow.model.lm import LM

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

SMALLEST = 1e-10  # if an input is always zero (its channel was pruned), its block must still have a nonzero weight


def collect(lm: LM, run: Run) -> tuple[dict[str, np.ndarray], str]:
    """Returns the mean squares [in] of each linear layer's inputs by GGUF name, and the SHA-256 of the calibration data."""
    from winnow.data.calibration import calibration_batches
    from winnow.method import calibration_statistics

    batches, digest = calibration_batches(lm, run)
    mean_squares = calibration_statistics.cached_statistics(
        lm.model, run, "importance", (digest,), lambda: _mean_squares(lm, batches, run)
    )
    return {name: mean.numpy() for name, mean in mean_squares.items()}, digest


def _mean_squares(lm: LM, batches: Sequence[torch.Tensor], run: Run) -> dict[str, torch.Tensor]:
    from winnow.method.blocks import iterate_blocks
    from winnow.model.gguf.architectures import TensorNames
    from winnow.model.layers import decoder_blocks, linears

    gguf_names = TensorNames(lm.model.config)
    names = {module: name for name, module in linears(lm.model).items()}
    tokens = sum(batch.numel() for batch in batches)
    count = len(decoder_blocks(lm.model))
    mean_squares: dict[str, torch.Tensor] = {}
    for index, block, run_calibration in iterate_blocks(lm.model, batches, run):
        with _squares(block) as squares:
            run_calibration()
        for linear, sum_i in squares.items():
            mean = (sum_i / tokens).clamp_min(SMALLEST)
            mean_squares[gguf_names[f"{names[linear]}.weight"]] = mean.float().cpu()
        logger.info(f"gguf: block {index + 1} of {count}")
    return mean_squares


@contextmanager
def _squares(block: nn.Module) -> Iterator[dict[nn.Linear, torch.Tensor]]:
    """Sums the squares [in] of the inputs of each linear layer of a block, over all tokens that pass while it is open."""
    layers = list(linears_in(block).values())
    sums = {m: torch.zeros(m.in_features, dtype=torch.float64, device=m.weight.device) for m in layers}

    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        sums[module] += args[0].detach().float().square().flatten(0, -2).sum(0)

    handles = [module.register_forward_pre_hook(add) for module in layers]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
