"""Predicts the tensors of a model's files after a pipeline, from its configuration alone.

A `ModelLayout` is built on the meta device; each stage converts it to the layout of its own output (`Stage.predict`).

    python compress.py method=[wanda,rtn] dry_run=true
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.estimate.file_sizes import dtype_of_file, other_bytes, stored_sizes
from winnow.model import adapter
from winnow.model.folder import ADAPTER_FILES
from winnow.model.lm import LM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from winnow.model.spec import ModelSpec

ENTRY_BYTES = 110  # bytes of a tensor in a safetensors header: its name, type, shape and offsets


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of the model as it will be stored.

    Attributes:
        shape: shape of the dense tensor.
        disk_bytes: size of everything that it is stored as, including scales.
        memory_bytes: size in memory after transformers has loaded the artifact.
        linear: whether it is a weight matrix [out, in] of a decoder block, which quantization narrows.
        entries: number of tensors in the file.
        block: index of its decoder block, if it belongs to one.
        matrix_kind: how the architecture stores the matrix (`winnow.model.unfused`).
    """

    shape: tuple[int, ...]
    disk_bytes: int
    memory_bytes: int
    linear: bool = False
    entries: int = 1
    block: int | None = None
    matrix_kind: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelLayout:
    """A planned model: its configuration, its tensors by name, and how its KV cache is stored.

    Attributes:
        other_bytes: size of the files that are not weights (tokenizer, configuration), as far as they are known.
        cache_bits: bits of a number in a quantized KV cache, including scales; None keeps the model's own type.
        cache_residual: maximum number of the newest tokens that stay unquantized.
        kind: format of the weights' file, `safetensors` or `gguf`.
        layout: how a library has packed the matrices: `compressed-tensors`, `auto-round`, bitsandbytes' `int8` or `4bit`; empty
            for plain numbers.
        passes_gradients: whether gradients pass through the matrices, so that what precedes them can be trained.
        sparse: whether weights have been pruned; a stage that keeps zeros at zero then needs masks.
        base: the model at the start of the pipeline, if it is known, for example as a teacher.
        computed_in: compute dtype of the hardware, by torch's name; None is the dtype of the weights.
    """

    config: PretrainedConfig
    tensors: Mapping[str, TensorLayout]
    other_bytes: int = 0
    cache_bits: float | None = None
    cache_residual: int = 0
    kind: str = "safetensors"
    layout: str = ""
    passes_gradients: bool = True
    sparse: bool = False
    base: ModelLayout | None = None
    computed_in: str | None = None

    @property
    def dtype(self) -> str:
        """The dtype in which unquantized weights are stored, by torch's name."""
        return str(getattr(self.config, "dtype", None) or "bfloat16").removeprefix("torch.")

    @property
    def compute_dtype(self) -> str:
        return self.computed_in or self.dtype

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation element."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def is_widened(self) -> bool:
        """Whether weights are computed with in a wider dtype than they are stored in."""
        return self.compute_dtype == "float32" and self.dtype != "float32"

    @property
    def served_bytes(self) -> int:
        """Bytes of the weights when transformers serves the artifact: dense weights are in the compute dtype."""
        stored, served = 4 if self.dtype == "float32" else 2, self.element_bytes
        return sum(
            t.memory_bytes * served // stored if t.memory_bytes >= t.numel * stored else t.memory_bytes
            for t in self.tensors.values()
        )

    @property
    def outside_blocks(self) -> list[TensorLayout]:
        """The tensors outside the decoder blocks: embeddings, head, last norm."""
        return [t for t in self.tensors.values() if t.block is None]

    @property
    def disk_bytes(self) -> int:
        header = ENTRY_BYTES * sum(t.entries for t in self.tensors.values())
        return self.other_bytes + header + sum(t.disk_bytes for t in self.tensors.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights when the artifact is loaded."""
        return sum(t.memory_bytes for t in self.tensors.values())

    @property
    def linear_parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values() if t.linear)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on disk, and in a runtime that computes with them as they are stored."""
        return sum(t.disk_bytes for t in self.tensors.values())

    @property
    def linears(self) -> list[TensorLayout]:
        """The weight matrices [out, in] of the blocks."""
        return [t for t in self.tensors.values() if t.linear]

    @property
    def largest_block(self) -> list[TensorLayout]:
        """The tensors of the decoder block with the largest memory."""
        blocks: dict[int, list[TensorLayout]] = defaultdict(list)
        for t in self.tensors.values():
            if t.block is not None:
                blocks[t.block].append(t)
        return max(blocks.values(), key=lambda block: sum(t.memory_bytes for t in block), default=[])

    @property
    def spec(self) -> ModelSpec:
        """The model's numbers: layers, widths, and the KV cache in the compute dtype."""
        return _spec_of(_ConfigKey(self.config), self.computed_in)

    def with_linears(self, change: Callable[[str, TensorLayout], TensorLayout]) -> ModelLayout:
        """Returns the layout with each linear weight of the blocks replaced by `change(name, tensor_layout)`."""
        changed = {name: change(name, t) if t.linear else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=changed)

    def grouped(self, bits: float, group_size: int, scale_bytes: int = 2) -> ModelLayout:
        """Returns the layout with linear weights as packed integers and one scale a group, as compressed-tensors stores them."""

        from winnow.model.packing import check_loadable, group_size_error

        check_loadable(self.spec.name)

        def change(name: str, t: TensorLayout) -> TensorLayout:
            rows, width = t.shape
            if width % group_size:
                raise group_size_error(group_size, name, width, [t.shape[1] for t in self.linears])
            words = rows * math.ceil(width * bits / 32)
            scales = rows * (width // group_size) * scale_bytes
            return dataclasses.replace(t, disk_bytes=4 * words + scales + 16, entries=3)  # 16: the shape, two int64

        return dataclasses.replace(self.with_linears(change), layout="compressed-tensors")

    def in_16_bits(self) -> ModelLayout:
        """Returns the layout with single precision replaced by bfloat16, for formats that compute in half precision."""
        if self.dtype != "float32":
            return self
        config = copy.deepcopy(self.config)
        config.dtype = "bfloat16"
        return dataclasses.replace(self, config=config, tensors=dense_tensors(config))

    def reshaped(self, config: PretrainedConfig) -> ModelLayout:
        """Returns the layout of the model with another configuration (fewer layers, narrower), stored densely."""
        return dataclasses.replace(self, config=config, tensors=dense_tensors(config), base=self.base or self)


@dataclass(frozen=True, eq=False)
class _ConfigKey:
    """A configuration as a cache key that equals only itself, because comparing contents takes a millisecond."""

    config: PretrainedConfig

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ConfigKey) and other.config is self.config


@functools.lru_cache(maxsize=64)
def _spec_of(key: _ConfigKey, dtype: str | None) -> ModelSpec:
    return _spec(type(key.config), key.config.to_json_string(), dtype)  # type: ignore[arg-type]  # classes are hashable


@functools.lru_cache(maxsize=64)
def _spec(config_class: type[PretrainedConfig], config_json: str, dtype: str | None) -> ModelSpec:
    from winnow.model.spec import spec

    return spec(config_class(**json.loads(config_json)), dtype=dtype)


def layout_of(lm: LM) -> ModelLayout:
    """Returns the layout of a model saved again unchanged; no weight is read.

    Raises:
        UserError: transformers knows no causal LM for its configuration, or there is none.
    """
    from winnow.model.loading_errors import plain_errors

    config = lm.config()
    if lm.loading.dtype != "auto":
        dtype = lm.loading.dtype
    else:
        dtype = str(getattr(config, "dtype", None) or dtype_of_file(lm) or "bfloat16").removeprefix("torch.")
    config.dtype = dtype
    with plain_errors(lm.path or lm.name):
        plan = ModelLayout(config, dense_tensors(config), other_bytes=other_bytes(lm.path))
    if lm.path and getattr(config, "quantization_config", None) is not None:
        plan = _quantized_layout(plan, Path(lm.path))
    adapter_folder = adapter.folder_of(lm.path)
    if adapter_folder is not None:
        size = sum(
            (adapter_folder / name).stat().st_size for name in ADAPTER_FILES if (adapter_folder / name).is_file()
        )
        adapter_layout = TensorLayout((0,), size, 2 * size, entries=0)  # PEFT loads it in single precision
        plan = dataclasses.replace(plan, tensors={**plan.tensors, adapter.NAME: adapter_layout})
    return plan


def _quantized_layout(plan: ModelLayout, folder: Path) -> ModelLayout:
    """Returns the layout of a quantized model in a folder: how each linear weight is stored, from the headers of the files."""
    layers = {name.removesuffix(".weight") for name, t in plan.tensors.items() if t.linear}
    sizes = stored_sizes(folder, plan.config, layers)
    settings: Any = plan.config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    stays_packed = method == "bitsandbytes"  # transformers unpacks all other formats when it loads them

    def change(name: str, t: TensorLayout) -> TensorLayout:
        layer_sizes = sizes.get(name.removesuffix(".weight"), [])
        if not layer_sizes:
            return t
        memory_bytes = sum(layer_sizes) if stays_packed else t.memory_bytes
        return dataclasses.replace(t, disk_bytes=sum(layer_sizes), memory_bytes=memory_bytes, entries=len(layer_sizes))

    in_8_bits = settings.get("load_in_8bit") if isinstance(settings, dict) else getattr(settings, "load_in_8bit", False)
    name = str(getattr(method, "value", method))
    layout = ("int8" if in_8_bits else "4bit") if stays_packed else name
    return dataclasses.replace(plan.with_linears(change), layout=layout)


def dense_tensors(config: PretrainedConfig) -> dict[str, TensorLayout]:
    """Returns the tensors of a model of this configuration, in the configuration's dtype; tied tensors occur once.

    Matrices are those of the unfused model (`winnow.model.unfused`), which is also how checkpoints store them.
    """
    from winnow.model.layers import block_index_of_parameters
    from winnow.model.spec import build_on_meta
    from winnow.model.unfused import kinds_of_matrices, unfuse

    model: Any = build_on_meta(config)
    unfuse(model)
    matrix_kinds = {f"{name}.weight": matrix_kind for name, matrix_kind in kinds_of_matrices(model).items()}
    blocks = block_index_of_parameters(model)
    element_bytes = {"float32": 4}.get(str(getattr(config, "dtype", None)).removeprefix("torch."), 2)
    return {
        name: TensorLayout(
            tuple(p.shape),
            p.numel() * element_bytes,
            p.numel() * element_bytes,
            linear=name in matrix_kinds,
            block=blocks.get(name),
            matrix_kind=matrix_kinds.get(name, ""),
        )
        for name, p in model.named_parameters()
    }
