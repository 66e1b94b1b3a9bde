"""What a model will take after a pipeline, from its configuration alone: the tensors of its file, one by one.

A `ModelLayout` is made on the meta device; each stage turns it into the plan of what it will write (`Stage.predict`).

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

from winnow.model import adapter
from winnow.model.folder import ADAPTER_FILES, INDEX, content_files, header_of, is_weights, weight_files
from winnow.model.lm import LM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from winnow.model.spec import ModelSpec

ENTRY_BYTES = 110  # of a tensor in a safetensors header: its name, type, shape and offsets
# what `save` writes beside the weights, and nothing else that a downloaded folder may hold
_OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of the model as it will be stored.

    Attributes:
        shape: of the dense tensor.
        disk_bytes: of everything it is stored as, scales and the like included.
        memory_bytes: of what it takes when the artifact is loaded by transformers.
        linear: a weight matrix [out, in] of a decoder block: what quantization narrows.
        entries: tensors in the file.
        block: the index of the decoder block that it belongs to, if it belongs to one.
        holder: of a matrix: how its architecture holds it (`winnow.model.unfused`).
    """

    shape: tuple[int, ...]
    disk_bytes: int
    memory_bytes: int
    linear: bool = False
    entries: int = 1
    block: int | None = None
    holder: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelLayout:
    """A model that is to be: its configuration, its tensors by name, and how its cache is stored.

    Attributes:
        other_bytes: of the files that are not weights (tokenizer, configuration), as far as they are known.
        cache_bits: of a number in a quantized KV cache, scales included; None keeps the model's own type.
        cache_residual: newest tokens that wait unquantized, at most.
        kind: of the weights' file, `safetensors` or `gguf`.
        layout: how a library has packed the matrices: `compressed-tensors`, `auto-round`, bitsandbytes' `int8` or `4bit`; empty
            where they are plain numbers.
        passes_gradients: what lies before the matrices can be trained through them.
        sparse: weights have been pruned; a stage that keeps zeros at zero has to hold masks.
        base: the model that the pipeline began with, where a plan knows; a teacher, for one.
        computed_in: the type that the hardware computes in, by torch's name; None is that of the weights.
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
        """The type that weights are stored in where they are not quantized, by torch's name."""
        return str(getattr(self.config, "dtype", None) or "bfloat16").removeprefix("torch.")

    @property
    def compute_dtype(self) -> str:
        return self.computed_in or self.dtype

    @property
    def element_bytes(self) -> int:
        """Of a number that is computed with, as it flows through the model."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def is_widened(self) -> bool:
        """Whether weights are computed with in a wider type than they are stored in."""
        return self.compute_dtype == "float32" and self.dtype != "float32"

    @property
    def served_bytes(self) -> int:
        """Of the weights when transformers has loaded the artifact to serve it: dense ones in the type that is computed in."""
        stored, served = 4 if self.dtype == "float32" else 2, self.element_bytes
        return sum(
            t.memory_bytes * served // stored if t.memory_bytes >= t.numel * stored else t.memory_bytes
            for t in self.tensors.values()
        )

    @property
    def outside_blocks(self) -> list[TensorLayout]:
        """The tensors that belong to no decoder block: embeddings, head, last norm."""
        return [t for t in self.tensors.values() if t.block is None]

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

    @property
    def weight_bytes(self) -> int:
        """Of the weights on disk; what a runtime holds that computes with them as they are stored."""
        return sum(t.disk_bytes for t in self.tensors.values())

    @property
    def linears(self) -> list[TensorLayout]:
        """The weight matrices [out, in] of the blocks."""
        return [t for t in self.tensors.values() if t.linear]

    @property
    def largest_block(self) -> list[TensorLayout]:
        """The tensors of the decoder block that takes most memory."""
        blocks: dict[int, list[TensorLayout]] = defaultdict(list)
        for t in self.tensors.values():
            if t.block is not None:
                blocks[t.block].append(t)
        return max(blocks.values(), key=lambda block: sum(t.memory_bytes for t in block), default=[])

    @property
    def spec(self) -> ModelSpec:
        """The model's numbers: layers, widths, and the cache in the type that is computed in."""
        return _spec_of(_Same(self.config), self.computed_in)

    def with_linears(self, change: Callable[[str, TensorLayout], TensorLayout]) -> ModelLayout:
        """Another storage for each linear weight of the blocks; `change(name, stored)` gives it."""
        changed = {name: change(name, t) if t.linear else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=changed)

    def grouped(self, bits: float, group_size: int, scale_bytes: int = 2) -> ModelLayout:
        """Linear weights as packed integers with a scale a group, as compressed-tensors stores them."""

        from winnow.model.packing import check_read_back, ill_fitting

        check_read_back(self.spec.name)

        def change(name: str, t: TensorLayout) -> TensorLayout:
            rows, width = t.shape
            if width % group_size:
                raise ill_fitting(group_size, name, width, [t.shape[1] for t in self.linears])
            words = rows * math.ceil(width * bits / 32)
            scales = rows * (width // group_size) * scale_bytes
            return dataclasses.replace(t, disk_bytes=4 * words + scales + 16, entries=3)  # and the shape: two int64

        return dataclasses.replace(self.with_linears(change), layout="compressed-tensors")

    def in_16_bits(self) -> ModelLayout:
        """The same where what is saved in single precision becomes bfloat16: formats that compute in half precision."""
        if self.dtype != "float32":
            return self
        config = copy.deepcopy(self.config)
        config.dtype = "bfloat16"
        return dataclasses.replace(self, config=config, tensors=dense_tensors(config))

    def reshaped(self, config: PretrainedConfig) -> ModelLayout:
        """The plan of the same model with another configuration (fewer layers, narrower), stored densely."""
        return dataclasses.replace(self, config=config, tensors=dense_tensors(config), base=self.base or self)


@dataclass(frozen=True, eq=False)
class _Same:
    """A configuration as a key: equal to itself alone, since to compare what is in it takes a millisecond."""

    config: PretrainedConfig

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config


@functools.lru_cache(maxsize=64)
def _spec_of(same: _Same, dtype: str | None) -> ModelSpec:
    return _spec(type(same.config), same.config.to_json_string(), dtype)  # type: ignore[arg-type]  # classes are hashable


@functools.lru_cache(maxsize=64)
def _spec(kind: type[PretrainedConfig], settings: str, dtype: str | None) -> ModelSpec:
    from winnow.model.spec import spec

    return spec(kind(**json.loads(settings)), dtype=dtype)


def layout_of(lm: LM) -> ModelLayout:
    """The plan of a model as it is, saved again unchanged; no weight is read.

    Raises:
        UserError: transformers knows no causal LM for its configuration, or there is none.
    """
    from winnow.model.loading_errors import plain_errors

    config = lm.config()
    if lm.loading.dtype != "auto":
        dtype = lm.loading.dtype
    else:
        dtype = str(getattr(config, "dtype", None) or _dtype_of_file(lm) or "bfloat16").removeprefix("torch.")
    config.dtype = dtype
    with plain_errors(lm.path or lm.name):
        plan = ModelLayout(config, dense_tensors(config), other_bytes=_other_bytes(lm.path))
    if lm.path and getattr(config, "quantization_config", None) is not None:
        plan = _as_stored(plan, Path(lm.path))
    beside = adapter.folder_of(lm.path)
    if beside is not None:
        size = sum((beside / name).stat().st_size for name in ADAPTER_FILES if (beside / name).is_file())
        stored = TensorLayout((0,), size, 2 * size, entries=0)  # PEFT loads it in single precision
        plan = dataclasses.replace(plan, tensors={**plan.tensors, adapter.NAME: stored})
    return plan


def _as_stored(plan: ModelLayout, folder: Path) -> ModelLayout:
    """The plan of a quantized model in a folder: what each linear weight is stored as, from the headers of the files."""
    from winnow.model.unfused import renaming

    sizes: dict[str, list[int]] = defaultdict(list)
    name_in_model = renaming(plan.config)
    layers = {name.removesuffix(".weight") for name, t in plan.tensors.items() if t.linear}
    for file in weight_files(folder):
        for stored_as, entry in header_of(file).items():
            name = name_in_model(stored_as)
            layer = next((p for p in _prefixes(name) if p in layers), None)
            if layer is not None and name != f"{layer}.bias":
                start, end = entry["data_offsets"]
                sizes[layer].append(end - start)
    settings: Any = plan.config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    computes_with_it = method == "bitsandbytes"  # what else there is, transformers unpacks when it is loaded

    def change(name: str, t: TensorLayout) -> TensorLayout:
        found = sizes[name.removesuffix(".weight")]
        if not found:
            return t
        held = sum(found) if computes_with_it else t.memory_bytes
        return dataclasses.replace(t, disk_bytes=sum(found), memory_bytes=held, entries=len(found))

    in_8_bits = settings.get("load_in_8bit") if isinstance(settings, dict) else getattr(settings, "load_in_8bit", False)
    name = str(getattr(method, "value", method))
    layout = ("int8" if in_8_bits else "4bit") if computes_with_it else name
    return dataclasses.replace(plan.with_linears(change), layout=layout)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _dtype_of_file(lm: LM) -> str | None:
    """The type of the first floating-point tensor in a local safetensors file, from its header."""
    files = weight_files(Path(lm.path)) if lm.path and Path(lm.path).is_dir() else []
    if not files or files[0].suffix != ".safetensors":
        return None
    types = [entry["dtype"] for entry in header_of(files[0]).values()]
    return next((_SAFETENSORS_DTYPES[t] for t in types if t in _SAFETENSORS_DTYPES), None)


def _other_bytes(path: str | None) -> int:
    """Of the tokenizer's and the configuration's files, as far as they are on this machine."""
    if path is None:
        return 0
    if Path(path).is_dir():
        names = content_files(Path(path))
        return sum(
            file.stat().st_size
            for name, file in names.items()
            if not (is_weights(name) or "/" in name or name == INDEX)
        )
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(path, name) for name in _OTHER_FILES]
    return sum(Path(file).stat().st_size for file in cached if isinstance(file, str))


def dense_tensors(config: PretrainedConfig) -> dict[str, TensorLayout]:
    """The tensors of a model of this configuration, each in the configuration's dtype; tied ones once.

    Matrices are those of the model that is taken apart (`winnow.model.unfused`), as checkpoints have them, too.
    """
    from winnow.model.layers import in_blocks
    from winnow.model.spec import on_meta
    from winnow.model.unfused import holders, unfuse

    model: Any = on_meta(config)
    unfuse(model)
    held = {f"{name}.weight": holder for name, holder in holders(model).items()}
    blocks = in_blocks(model)
    width = {"float32": 4}.get(str(getattr(config, "dtype", None)).removeprefix("torch."), 2)
    return {
        name: TensorLayout(
            tuple(p.shape),
            p.numel() * width,
            p.numel() * width,
            linear=name in held,
            block=blocks.get(name),
            holder=held.get(name, ""),
        )
        for name, p in model.named_parameters()
    }
