"""Lists the files of a folder that belong to the model, which are those that loading reads.

Users' folders also hold optimizer states, the same weights in another format, or git's files. All code that sizes, hashes, copies
or checks a model takes its files from this module.
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
# names by which transformers finds a configuration, a tokenizer with its chat templates, and a model's own code
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
# files to download from the hub: those above, and the weights that loading prefers
ON_THE_HUB = (*_SETTINGS, *_TOKENIZER, *_CODE, "*.safetensors", INDEX, f"{ADAPTER}/*")


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files, chosen as transformers does; files that an index names may be missing.

    Raises:
        UserError: the index is damaged.
    """
    for single_file, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single_file).is_file():
            return [folder / single_file]  # an index in the same folder is ignored
        if (folder / index).is_file():
            return [folder / name for name in _shard_names(folder / index)]
        if single_file == WEIGHTS and (ggufs := sorted(folder.glob("*.gguf"))):
            return ggufs
    return []


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.path={index.parent}: its {index.name} is damaged ({error}); copy the model again"
        ) from error


def content_files(folder: Path) -> dict[str, Path]:
    """Returns all files of the model by their names relative to the folder: weights, settings, tokenizer, adapter, code."""
    files = [file for file in weight_files(folder) if file.is_file()]
    indexes = [index for index in (INDEX, PICKLED_INDEX) if (folder / index).is_file()]
    if files and files[0].name not in (WEIGHTS, PICKLED):
        files += [folder / name for name in indexes]
    for pattern in (*_SETTINGS, *_TOKENIZER, *_CODE):
        files += folder.glob(pattern)
    for place in (folder, folder / ADAPTER):
        if (place / ADAPTER_FILES[0]).is_file():
            files += [place / name for name in ADAPTER_FILES]
    return {path.relative_to(folder).as_posix(): path for path in sorted(set(files)) if path.is_file()}


def is_weights(name: str) -> bool:
    """Returns whether a file of this name holds weights."""
    return name.endswith(WEIGHT_SUFFIXES)


def decides_weights(name: str) -> bool:
    """Returns whether a file of this name defines the network itself, rather than its tokenizer or generation settings."""
    return (
        is_weights(name)
        or Path(name).name in ("config.json", INDEX, PICKLED_INDEX, ADAPTER_FILES[0])
        or name.endswith(".py")
    )


def header_of(file: Path) -> dict[str, Any]:
    """Returns each tensor's `dtype`, `shape` and `data_offsets` in a safetensors file, by name.

    The format is 8 bytes with the header's length, the header as JSON, and the data.

    Raises:
        ValueError: the file is not a safetensors file, or is shorter than its header says.
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
