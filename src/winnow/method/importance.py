"""Measures how strongly the units of a model respond to calibration texts; width pruning ranks units by it.

The measure is the mean magnitude over the tokens of a text, then the L2 norm over texts: Minitron (arXiv:2407.14679), section
2.2, with the aggregation that the paper found best.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.hardware.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Measure = Callable[[torch.Tensor], torch.Tensor]  # activations [rows, T, n] -> a value for each row and unit


@dataclass(frozen=True)
class Importances:
    """The importance of each unit on the calibration data; higher matters more.

    Attributes:
        channels: [intermediate] for the MLP of each layer.
        heads: [query heads] for each layer.
        hidden: [hidden] for the model.
        energy: [hidden] for each norm over the hidden states: the mean share of each dimension in the sum of squares that
            the norm divides by.
    """

    channels: list[torch.Tensor]
    heads: list[torch.Tensor]
    hidden: torch.Tensor
    energy: dict[nn.Module, torch.Tensor]


def cached_importances(
    model: PreTrainedModel, heads: int, batches: Sequence[torch.Tensor], digest: str, run: Run
) -> Importances:
    """Returns `importances`, from the cache if the same weights and the same texts (those of `digest`) were measured before."""
    from winnow.method import calibration_statistics

    norms = {module: f"energy.{name}" for name, module in model.named_modules()}

    def compute() -> calibration_statistics.Statistics:
        result = importances(model, heads, batches, run)
        layers = {f"channels.{n}": scores for n, scores in enumerate(result.channels)}
        layers |= {f"heads.{n}": scores for n, scores in enumerate(result.heads)}
        return layers | {"hidden": result.hidden} | {norms[norm]: share for norm, share in result.energy.items()}

    statistics = calibration_statistics.cached_statistics(model, run, "widths", (heads, digest), compute)
    count = sum(name.startswith("channels.") for name in statistics)
    return Importances(
        [statistics[f"channels.{n}"] for n in range(count)],
        [statistics[f"heads.{n}"] for n in range(count)],
        statistics["hidden"],
        {norm: statistics[name] for norm, name in norms.items() if name in statistics},
    )


@torch.no_grad()
def importances(model: PreTrainedModel, heads: int, batches: Sequence[torch.Tensor], run: Run) -> Importances:
    """Measures the blocks of a Llama-like model with `heads` query heads, one after another; leaves the model unchanged."""
    from winnow.method.blocks import iterate_blocks
    from winnow.model.layers import decoder_blocks

    blocks = decoder_blocks(model)
    final_norm: Any = model.base_model.norm
    result = Importances([], [], torch.zeros(final_norm.weight.shape, dtype=torch.float64), {})
    tokens = sum(batch.numel() for batch in batches)
    block: Any
    for index, block, run_calibration in iterate_blocks(model, batches, run):
        attention, mlp = block.self_attn, block.mlp
        last = index == len(blocks) - 1
        norms = [norm for _, norm in norms_of(block, len(result.hidden))] + [final_norm] * last
        measures: dict[nn.Module, Measure] = {
            **dict.fromkeys((attention.q_proj, mlp.gate_proj, mlp.down_proj), magnitude),
            attention.o_proj: lambda x: magnitude(x.unflatten(-1, (heads, -1)).norm(dim=-1)),
            **dict.fromkeys(norms, energy),
        }
        with _input_measures(measures) as sums:
            after_final_norm = torch.zeros_like(result.hidden)

            def add_final_norm(number: int, output: torch.Tensor, total: torch.Tensor = after_final_norm) -> None:
                total += magnitude(final_norm(output.to(final_norm.weight.device)).float()).sum(0).double().cpu()

            run_calibration(add_final_norm) if last else run_calibration()
        result.hidden.add_(sums[attention.q_proj].sqrt() + sums[mlp.gate_proj].sqrt() + after_final_norm.sqrt())
        result.heads.append(sums[attention.o_proj].sqrt())
        result.channels.append(sums[mlp.down_proj].sqrt())
        result.energy.update({norm: sums[norm] / tokens for norm in norms})
        logger.info(f"width: block {index + 1} of {len(blocks)}")
    return result


def norms_of(block: nn.Module, width: int) -> list[tuple[str, nn.Module]]:
    """Returns the norms over the hidden states among a block's children, with their names."""
    return [(n, m) for n, m in block.named_children() if [p.shape for p in m.parameters()] == [(width,)]]


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Returns [rows, n], the square of the mean magnitude over the tokens; its sum over rows is the squared L2 norm."""
    return x.abs().mean(1).square()


def energy(x: torch.Tensor) -> torch.Tensor:
    """Returns [rows, n], the share of each dimension in a token's sum of squares, summed over the tokens."""
    squares = x.square()
    return (squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)).sum(1)


class _input_measures:  # noqa: N801 (a context manager, used like a function)
    """Applies each module's measure to its inputs while the context is open, and sums the results over all rows."""

    def __init__(self, measures: dict[nn.Module, Measure]) -> None:
        self.measures = measures

    def __enter__(self) -> dict[nn.Module, torch.Tensor]:
        sums: dict[nn.Module, torch.Tensor] = {}

        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            value = self.measures[module](args[0].detach().float()).sum(0).double().cpu()
            sums[module] = sums[module] + value if module in sums else value

        self.handles = [module.register_forward_pre_hook(add) for module in self.measures]
        return sums

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
