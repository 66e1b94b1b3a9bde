"""How strongly the units of a model respond to calibration texts: what width pruning chooses by.

Mean magnitude over the tokens of a text, L2 norm over texts: Minitron (arXiv:2407.14679), section 2.2, with the aggregation that
the paper found best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.hardware.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = Callable[[torch.Tensor], torch.Tensor]  # of activations [rows, T, n]: a value for each row and unit


@dataclass(frozen=True)
class Importances:
    """What calibration says of each unit: the more, the more it matters.

    Attributes:
        channels: [intermediate] of the MLP of each layer.
        heads: [query heads] of each layer.
        hidden: [hidden] of the model.
        energy: [hidden] of each norm over the hidden states: the mean share of each dimension in the sum of squares that
            the norm divides by.
    """

    channels: list[torch.Tensor]
    heads: list[torch.Tensor]
    hidden: torch.Tensor
    energy: dict[nn.Module, torch.Tensor]


def kept_importances(
    model: PreTrainedModel, heads: int, batches: Sequence[torch.Tensor], digest: str, run: Run
) -> Importances:
    """`importances`, or what they were when the same weights saw the same texts, those of the `digest`, before."""
    from winnow.method import calibration_statistics

    norms = {module: f"energy.{name}" for name, module in model.named_modules()}

    def compute() -> calibration_statistics.Statistics:
        found = importances(model, heads, batches, run)
        layers = {f"channels.{n}": each for n, each in enumerate(found.channels)}
        layers |= {f"heads.{n}": each for n, each in enumerate(found.heads)}
        return layers | {"hidden": found.hidden} | {norms[norm]: each for norm, each in found.energy.items()}

    found = calibration_statistics.cached_statistics(model, run, "widths", (heads, digest), compute)
    count = sum(name.startswith("channels.") for name in found)
    return Importances(
        [found[f"channels.{n}"] for n in range(count)],
        [found[f"heads.{n}"] for n in range(count)],
        found["hidden"],
        {norm: found[name] for norm, name in norms.items() if name in found},
    )


@torch.no_grad()
def importances(model: PreTrainedModel, heads: int, batches: Sequence[torch.Tensor], run: Run) -> Importances:
    """Walks over the blocks of a Llama-like model with `heads` query heads; the model is left as it is."""
    from winnow.method.blocks import iterate_blocks
    from winnow.model.layers import decoder_blocks

    blocks = decoder_blocks(model)
    final: Any = model.base_model.norm
    found = Importances([], [], torch.zeros(final.weight.shape, dtype=torch.float64), {})
    tokens = sum(batch.numel() for batch in batches)
    block: Any
    for index, block, replay in iterate_blocks(model, batches, run):
        attention, mlp = block.self_attn, block.mlp
        last = index == len(blocks) - 1
        norms = [norm for _, norm in norms_of(block, len(found.hidden))] + [final] * last
        watched: dict[nn.Module, Measure] = {
            **dict.fromkeys((attention.q_proj, mlp.gate_proj, mlp.down_proj), magnitude),
            attention.o_proj: lambda x: magnitude(x.unflatten(-1, (heads, -1)).norm(dim=-1)),
            **dict.fromkeys(norms, energy),
        }
        with _sums_of_inputs(watched) as sums:
            after_final = torch.zeros_like(found.hidden)

            def see(number: int, output: torch.Tensor, total: torch.Tensor = after_final) -> None:
                total += magnitude(final(output.to(final.weight.device)).float()).sum(0).double().cpu()

            replay(see) if last else replay()
        found.hidden.add_(sums[attention.q_proj].sqrt() + sums[mlp.gate_proj].sqrt() + after_final.sqrt())
        found.heads.append(sums[attention.o_proj].sqrt())
        found.channels.append(sums[mlp.down_proj].sqrt())
        found.energy.update({norm: sums[norm] / tokens for norm in norms})
        run.log(f"width: block {index + 1} of {len(blocks)}")
    return found


def norms_of(block: nn.Module, width: int) -> list[tuple[str, nn.Module]]:
    """The norms over the hidden states among a block's children, by name."""
    return [(n, m) for n, m in block.named_children() if [p.shape for p in m.parameters()] == [(width,)]]


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """[rows, n]: the square of the mean magnitude over the tokens; summed over rows, the square of the L2 norm."""
    return x.abs().mean(1).square()


def energy(x: torch.Tensor) -> torch.Tensor:
    """[rows, n]: the share of each dimension in a token's sum of squares, summed over the tokens."""
    squares = x.square()
    return (squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)).sum(1)


class _sums_of_inputs:  # noqa: N801 (a context manager, used like a function)
    """Sums, over all rows that enter a module meanwhile, what is measured of its inputs."""

    def __init__(self, watched: dict[nn.Module, Measure]) -> None:
        self.watched = watched

    def __enter__(self) -> dict[nn.Module, torch.Tensor]:
        sums: dict[nn.Module, torch.Tensor] = {}

        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            value = self.watched[module](args[0].detach().float()).sum(0).double().cpu()
            sums[module] = sums[module] + value if module in sums else value

        self.handles = [module.register_forward_pre_hook(add) for module in self.watched]
        return sums

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
