"""What a model will take after a pipeline, from its configuration alone: the tensors of its file, one by one.

A `Plan` is made on the meta device; each stage turns it into the plan of what it will write (`Stage.predict`).

    python compress.py method=[wanda,rtn] dry_run=true
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENTRY_BYTES = 110  # of a tensor in a safetensors header: its name, type, shape and offsets


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as it will be stored.

    Attributes:
        shape: of the dense tensor.
        disk_bytes: of everything it is stored as, scales and the like included.
        memory_bytes: of what it takes when the artifact is loaded by transformers.
        linear: a weight matrix [out, in] of a decoder block: what quantization narrows.
        entries: tensors in the file.
    """

    shape: tuple[int, ...]
    disk_bytes: int
    memory_bytes: int
    linear: bool = False
    entries: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """A model that is to be: its configuration, its tensors by name, and how its cache is stored.

    Attributes:
        other_bytes: of the files that are not weights (tokenizer, configuration), as far as they are known.
        cache_bits: of a quantized KV cache; None keeps the model's own type.
        kind: of the weights' file, `safetensors` or `gguf`.
    """

    config: PretrainedConfig
    tensors: Mapping[str, Stored]
    other_bytes: int = 0
    cache_bits: int | None = None
    kind: str = "safetensors"

    @property
    def disk_bytes(self) -> int:
        header = ENTRY_BYTES * sum(t.entries for t in self.tensors.values())
        return self.other_bytes + header + sum(t.disk_bytes for t in self.tensors.values())

    @property
    def memory_bytes(self) -> int:
        """Of the weights when the artifact is loaded."""
        return sum(t.memory_bytes for t in self.tensors.values())

    @property
    def linear_parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values() if t.linear)

    def with_linears(self, change: Callable[[str, Stored], Stored]) -> Plan:
        """Another storage for each linear weight of the blocks; `change(name, stored)` gives it."""
        changed = {name: change(name, t) if t.linear else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=changed)

    def grouped(self, bits: float, group_size: int, scale_bytes: int = 2) -> Plan:
        """Linear weights as packed integers with a scale a group, as compressed-tensors stores them."""

        def change(name: str, t: Stored) -> Stored:
            rows, width = t.shape
            if width % group_size:
                raise UserError(f"group_size={group_size} does not divide the width {width} of {name}")
            words = rows * math.ceil(width * bits / 32)
            scales = rows * (width // group_size) * scale_bytes
            return dataclasses.replace(t, disk_bytes=4 * words + scales + 16, entries=3)  # and the shape: two int64

        return self.with_linears(change)

    def reshaped(self, config: PretrainedConfig) -> Plan:
        """The plan of the same model with another configuration (fewer layers, narrower), stored densely."""
        return dataclasses.replace(self, config=config, tensors=dense_tensors(config))


def dense_tensors(config: PretrainedConfig) -> dict[str, Stored]:
    """The tensors of a model of this configuration, each in the configuration's dtype; tied ones once."""
    from winnow.model.packing import linears
    from winnow.model.spec import on_meta

    model: Any = on_meta(config)
    names = {f"{name}.weight" for name in linears(model)}
    width = {"float32": 4}.get(str(getattr(config, "dtype", None)).removeprefix("torch."), 2)
    return {
        name: Stored(tuple(p.shape), p.numel() * width, p.numel() * width, name in names)
        for name, p in model.named_parameters()
    }
