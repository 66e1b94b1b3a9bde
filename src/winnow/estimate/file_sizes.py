"""Reads the sizes and types of a model's files from their headers, without reading a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.model.folder import INDEX, content_files, header_of, is_weights, weight_files
from winnow.model.lm import LM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# files that `save` writes beside the weights; a downloaded folder may contain others
_OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_sizes(folder: Path, config: PretrainedConfig, layers: Collection[str]) -> dict[str, list[int]]:
    """Returns the bytes of each tensor that a layer is stored as, its bias excepted, by the layer's name in the model."""
    from winnow.model.unfused import checkpoint_renaming

    sizes: dict[str, list[int]] = defaultdict(list)
    name_in_model = checkpoint_renaming(config)
    for file in weight_files(folder):
        for stored_name, entry in header_of(file).items():
            name = name_in_model(stored_name)
            layer = next((prefix for prefix in _prefixes(name) if prefix in layers), None)
            if layer is not None and name != f"{layer}.bias":
                start, end = entry["data_offsets"]
                sizes[layer].append(end - start)
    return sizes


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def dtype_of_file(lm: LM) -> str | None:
    """Returns the dtype of the first floating-point tensor in a local safetensors file, from its header."""
    files = weight_files(Path(lm.path)) if lm.path and Path(lm.path).is_dir() else []
    if not files or files[0].suffix != ".safetensors":
        return None
    types = [entry["dtype"] for entry in header_of(files[0]).values()]
    return next((_SAFETENSORS_DTYPES[t] for t in types if t in _SAFETENSORS_DTYPES), None)


def other_bytes(path: str | None) -> int:
    """Returns the bytes of the tokenizer's and the configuration's files, as far as they are on this machine."""
    if path is None:
        return 0
    if Path(path).is_dir():
        files = content_files(Path(path))
        return sum(
            file.stat().st_size
            for name, file in files.items()
            if not (is_weights(name) or "/" in name or name == INDEX)
        )
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(path, name) for name in _OTHER_FILES]
    return sum(Path(file).stat().st_size for file in cached if isinstance(file, str))
