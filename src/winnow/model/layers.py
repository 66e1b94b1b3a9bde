"""Where a model's decoder blocks are, and the matrices in them that are compressed: found by structure, not by names.

Architectures call their list of blocks `model.layers`, `transformer.h` or otherwise; one that none knows yet is found alike.

    linears(lm.model)["model.layers.0.mlp.down_proj"]
"""

from __future__ import annotations

from typing import Any

from torch import nn

from winnow.core.errors import UserError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: of all lists of modules that lie in no other, the one with the most parameters.

    Of a multimodal model it is that of the text decoder.

    Raises:
        UserError: the model has no such list.
    """
    return _located(model)[1]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks by name: what compression works on.

    Embeddings, the head and the routers of experts are not among them.
    """
    name, blocks = _located(model)
    return {f"{name}.{path}": linear for path, linear in linears_in(blocks).items()}


def linears_in(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block, or of a list of them, by their names in it, without routers."""
    routers = _routers(block)
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and m not in routers}


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head: of the modules beside the blocks that have vectors alone, the last.

    Raises:
        UserError: there is none.
    """
    name, _ = _located(model)
    beside = model.get_submodule(name.rpartition(".")[0]).children()
    norms = [m for m in beside if (shapes := [p.ndim for p in m.parameters()]) and max(shapes) == 1]
    if not norms:
        raise UserError(f"{type(model).__name__} has no norm after its decoder blocks")
    return norms[-1]


def in_blocks(model: nn.Module) -> dict[str, int]:
    """The parameters of the decoder blocks: the index of the block of each, by the parameter's name."""
    name, blocks = _located(model)
    return {f"{name}.{path}": int(path.split(".")[0]) for path, _ in blocks.named_parameters()}


def _located(model: nn.Module) -> tuple[str, nn.ModuleList]:
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
    """Layers that say which experts a token goes to, or how much of a shared one: a score an expert beside `experts`."""
    found: set[nn.Module] = set()
    for module in block.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module):
            number = getattr(experts, "num_experts", None) or len(list(experts.children()))
            beside = (m for m in module.children() if isinstance(m, nn.Linear))
            found |= {m for m in beside if m.out_features in (1, number)}
            found |= {
                m for n, m in module.named_modules() if n.startswith(("gate.", "router.")) and isinstance(m, nn.Linear)
            }
    return found
