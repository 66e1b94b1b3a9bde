"""Which files of a folder are the model: those that loading reads, and nothing that happens to lie beside them.

Folders that people have hold optimizer states of a training, the same weights in another format, git's own files. Whatever sizes,
hashes, copies or checks a model takes its files from here.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# by which transformers knows a configuration, a tokenizer and its chat templates, and code that comes with a model
_SETTINGS = ("config.json", "generation_config.json", "prompt.json", "quantization_config.json")
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges*.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
)
_CODE = ("*.py",)
# of a model on the hub, what to get: those, and the weights that loading prefers
ON_THE_HUB = (*_SETTINGS, *_TOKENIZER, *_CODE, "*.safetensors", INDEX, f"{ADAPTER}/*")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, as transformers chooses among them; those that an index names may be missing.

    Raises:
        UserError: the index is damaged.
    """
    for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / whole).is_file():
            return [folder / whole]  # an index beside it is not looked at
        if (folder / index).is_file():
            return [folder / name for name in _shards(folder / index)]
        if whole == WEIGHTS and (ggufs := sorted(folder.glob("*.gguf"))):
            return ggufs
    return []


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.path={index.parent}: its {index.name} is damaged ({error}); copy the model again"
        ) from error


def content_files(folder: Path) -> dict[str, Path]:
    """All files that are part of the model, by their names relative to the folder: weights, settings, tokenizer, adapter, code."""
    found = [file for file in weight_files(folder) if file.is_file()]
    indexes = [index for index in (INDEX, PICKLED_INDEX) if (folder / index).is_file()]
    if found and found[0].name not in (WEIGHTS, PICKLED):
        found += [folder / name for name in indexes]
    for pattern in (*_SETTINGS, *_TOKENIZER, *_CODE):
        found += folder.glob(pattern)
    for place in (folder, folder / ADAPTER):
        if (place / ADAPTER_FILES[0]).is_file():
            found += [place / name for name in ADAPTER_FILES]
    return {path.relative_to(folder).as_posix(): path for path in sorted(set(found)) if path.is_file()}


def is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES)


def decides_weights(name: str) -> bool:
    """Whether a file of this name says what the network is, and not only how it is talked to."""
    return (
        is_weights(name)
        or Path(name).name in ("config.json", INDEX, PICKLED_INDEX, ADAPTER_FILES[0])
        or name.endswith(".py")
    )


def header_of(file: Path) -> dict[str, Any]:
    """Of a safetensors file: each tensor's `dtype`, `shape` and `data_offsets`, by name (format: 8 bytes of length, JSON, data).

    Raises:
        ValueError: it is no safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        if size < 8:
            raise ValueError("it is shorter than 8 bytes")
        (length,) = struct.unpack("<Q", data.read(8))
        if length > size:
            raise ValueError("its header is cut short")
        header: dict[str, Any] = json.loads(data.read(length))
    header.pop("__metadata__", None)
    if 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) > size:
        raise ValueError("its data are cut short")
    return header
