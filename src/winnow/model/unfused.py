"""Turns every matrix of the decoder blocks into its own linear layer for methods, and back again for saving.

transformers stores the experts of a layer as one stacked parameter, and GPT-2's matrices transposed (`Conv1D`). Methods that
look for linear layers would miss both. `unfuse` splits them, and `fuse` is its inverse; the model computes the same.

    unfuse(model); linears(model)["model.layers.0.mlp.experts.3.w1"]; fuse(model)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from winnow.model.matrix_kinds import EXPERT, STACKED, TRANSPOSED


@dataclass(frozen=True)
class ExpertNames:
    """The names of an expert's three matrices in the checkpoints of an architecture.

    Attributes:
        stored_separately: whether checkpoints store each expert's matrices separately, so that each can be packed.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stored_separately: bool = False

    @property
    def matrices(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


class Expert(nn.Module):
    """The three matrices of an expert, [intermediate, hidden] twice and [hidden, intermediate]."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, names: ExpertNames) -> None:
        super().__init__()
        self.names = names
        for name, weight in zip((names.gate, names.up), gate_up.chunk(2), strict=True):
            self.add_module(name, _linear(weight))
        self.add_module(names.down, _linear(down))

    @property
    def matrices(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.names.matrices]


class Experts(nn.ModuleList):
    """Replaces transformers' module of stacked experts.

    Attributes:
        tokens: number of tokens routed to each expert since the last reset.
    """

    def __init__(self, stacked: Any, names: ExpertNames) -> None:
        gate_up, down = stacked.gate_up_proj.data, stacked.down_proj.data
        super().__init__(Expert(gate_up[index], down[index], names) for index in range(len(down)))
        self.num_experts = len(down)
        self.tokens = [0] * len(down)
        stacked.gate_up_proj = stacked.down_proj = None
        self.stacked = (stacked,)  # in a tuple, so that torch does not register it as a submodule

    @property
    def expert_list(self) -> list[Expert]:
        return [module for module in self if isinstance(module, Expert)]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes tokens [N, hidden], each routed to the experts `top_k_index` [N, k] with `top_k_weights` [N, k]."""
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.expert_list):
            slot, token = top_k_index.T.eq(index).nonzero(as_tuple=True)
            self.tokens[index] += len(token)
            if not len(token):
                continue
            gate, up, down = expert.matrices
            states = hidden_states[token]
            product = down(self.stacked[0]._apply_gate(torch.cat([gate(states), up(states)], dim=-1)))
            output.index_add_(0, token, (product * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    def restack(self) -> nn.Module:
        """Returns transformers' own module with the current weights."""
        stacked: Any = self.stacked[0]
        parts = [[m.weight.data for m in expert.matrices] for expert in self.expert_list]
        stacked.gate_up_proj = nn.Parameter(torch.stack([torch.cat([gate, up]) for gate, up, _ in parts]))
        stacked.down_proj = nn.Parameter(torch.stack([down for _, _, down in parts]))
        return stacked  # type: ignore[no-any-return]


class Untransposed(nn.Linear):
    """Replaces a `Conv1D`, which stores its matrix as [in, out]."""


def unfuse(model: Any) -> None:
    """Splits stacked experts and replaces `Conv1D` layers, in place; the new parameters share the old ones' memory."""
    from transformers.pytorch_utils import Conv1D

    names = expert_names(model.config)
    for path, module in list(model.named_modules()):
        if is_stacked(module):
            model.set_submodule(path, Experts(module, names))
        elif isinstance(module, Conv1D):
            model.set_submodule(path, _linear(module.weight.data.T, module.bias, Untransposed))


def fuse(model: nn.Module) -> None:
    """Reverses `unfuse` in place. Experts that are stored packed stay separate."""
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if isinstance(module, Experts) and not any(getattr(m, "quantization_scheme", None) for m in module.modules()):
            model.set_submodule(path, module.restack())
        elif isinstance(module, Untransposed):
            with torch.device("meta"):
                conv1d = Conv1D(module.out_features, module.in_features)
            conv1d.weight, conv1d.bias = nn.Parameter(module.weight.data.T.contiguous()), module.bias
            model.set_submodule(path, conv1d)


def prepare_for_stage(model: Any, matrices: tuple[str, ...] | None) -> None:
    """Unfuses the model for a stage that works on `matrices`, and fuses it for any other."""
    if matrices is None:
        fuse(model)
    else:
        unfuse(model)


@contextlib.contextmanager
def fused(model: Any) -> Iterator[None]:
    """Fuses the model inside the block, and unfuses it afterwards if it was unfused."""
    was_unfused = any(isinstance(module, Experts | Untransposed) for module in model.modules())
    fuse(model)
    try:
        yield
    finally:
        if was_unfused:
            unfuse(model)


def is_stacked(module: nn.Module) -> bool:
    """Returns whether a module holds stacked experts, in the layout that most architectures share."""
    usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    flags = all(getattr(module, name, None) is value for name, value in usual.items())
    return flags and all(_is_stack(getattr(module, name, None)) for name in ("gate_up_proj", "down_proj"))


def _is_stack(parameter: object) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.ndim == 3


def kinds_of_matrices(model: nn.Module) -> dict[str, str]:
    """Returns the kind of each matrix of an unfused model (see `matrix_kinds`), by its name."""
    from winnow.model.layers import linears

    matrices = linears(model)
    kinds = {n: TRANSPOSED if isinstance(m, Untransposed) else type(m).__name__ for n, m in matrices.items()}
    for path, module in model.named_modules():
        if isinstance(module, Expert):
            kind = EXPERT if module.names.stored_separately else STACKED
            kinds |= dict.fromkeys((f"{path}.{name}" for name in module.names.matrices), kind)
    return kinds


def unrouted_experts(model: nn.Module) -> list[str]:
    """Returns the names of experts that got no token, in layers that got some."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, Experts) and any(m.tokens)]
    return [f"{path}.{index}" for path, m in layers for index, tokens in enumerate(m.tokens) if not tokens]


def reset_token_counts(model: nn.Module) -> None:
    """Sets the token counts of all experts to 0."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.tokens = [0] * module.num_experts


def expert_names(config: Any) -> ExpertNames:
    """Returns the names of an expert's matrices from the table with which transformers reads checkpoints."""
    sources = {
        target: [source.split(".")[-2] for source in entry.source_patterns]
        for entry in _conversions(config)
        for target in entry.target_patterns
        if all(".experts.*." in f".{source}" for source in entry.source_patterns)
    }
    gate_and_up = next((names for target, names in sources.items() if target.endswith("experts.gate_up_proj")), [])
    down = next((names for target, names in sources.items() if target.endswith("experts.down_proj")), [])
    if len(gate_and_up) == 2 and len(down) == 1:
        return ExpertNames(gate_and_up[0], gate_and_up[1], down[0], stored_separately=True)
    return ExpertNames()


def checkpoint_renaming(config: Any) -> Callable[[str], str]:
    """Returns a function from a tensor's name in checkpoints to its name in the unfused model."""
    from transformers.core_model_loading import WeightRenaming

    renamings = [entry for entry in _conversions(config) if isinstance(entry, WeightRenaming)]
    pairs = [pair for r in renamings for pair in zip(r.source_patterns, r.target_patterns, strict=True)]

    def name_in_model(name: str) -> str:
        for pattern, target in pairs:
            name = re.sub(pattern, target, name)
        return name

    return name_in_model


def _conversions(config: Any) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kinds = dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type))
    return [entry for kind in kinds for entry in get_checkpoint_conversion_mapping(kind) or []]


def _linear(weight: torch.Tensor, bias: nn.Parameter | None = None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=True)
    if bias is not None:
        linear.bias = bias
    return linear
