"""Finds a model's decoder blocks and the matrices in them, by structure rather than by name.

Architectures call their list of blocks `model.layers`, `transformer.h` or otherwise; the search also works for unknown ones.

    linears(lm.model)["model.layers.0.mlp.down_proj"]
"""

from __future__ import annotations

from typing import Any

from torch import nn

from winnow.core.errors import UserError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the list of decoder blocks: the outermost list of modules with the most parameters.

    For a multimodal model this is the list of the text decoder.

    Raises:
        UserError: the model has no such list.
    """
    return _find_blocks(model)[1]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of the decoder blocks by name, which compression methods work on.

    Embeddings, the output head and the routers of experts are not included.
    """
    name, blocks = _find_blocks(model)
    return {f"{name}.{path}": linear for path, linear in linears_in(blocks).items()}


def linears_in(block: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of a block or a list of blocks, by their names in it, without routers."""
    routers = _routers(block)
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and m not in routers}


def final_norm(model: nn.Module) -> nn.Module:
    """Returns the norm between the last block and the head: the last sibling of the blocks whose parameters are all vectors.

    Raises:
        UserError: the model has no such norm.
    """
    name, _ = _find_blocks(model)
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    norms = [m for m in siblings if (shapes := [p.ndim for p in m.parameters()]) and max(shapes) == 1]
    if not norms:
        raise UserError(f"{type(model).__name__} has no norm after its decoder blocks")
    return norms[-1]


def block_index_of_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the block index of each parameter in the decoder blocks, by the parameter's name."""
    name, blocks = _find_blocks(model)
    return {f"{name}.{path}": int(path.split(".")[0]) for path, _ in blocks.named_parameters()}


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the list of the decoder blocks."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    root = get_decoder() if get_decoder is not None else model
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    lists: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, so that no method can be applied to it")
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return ".".join(part for part in (prefix, name) if part), lists[name]


def _routers(block: nn.Module) -> set[nn.Module]:
    """Returns the linear layers that route tokens: siblings of `experts` with one score per expert or one for a shared expert."""
    routers: set[nn.Module] = set()
    for module in block.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module):
            expert_count = getattr(experts, "num_experts", None) or len(list(experts.children()))
            siblings = (m for m in module.children() if isinstance(m, nn.Linear))
            routers |= {m for m in siblings if m.out_features in (1, expert_count)}
            routers |= {
                m for n, m in module.named_modules() if n.startswith(("gate.", "router.")) and isinstance(m, nn.Linear)
            }
    return routers
