"""Opens a GGUF file, and reports a damaged file, a part of a split model, or a file that is not a language model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.libraries import require

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

MAGIC = b"GGUF"
_PART_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class File:
    """The contents of a GGUF file; its tensors are mapped, not read.

    Attributes:
        keys: all key-value pairs, by their full name.
        tensors: by their GGUF name.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        return str(self.required("general.architecture"))

    def required(self, key: str) -> Any:
        """Returns the value of a key; raises UserError if the file lacks it."""
        if key not in self.keys:
            raise self.error(f"it lacks the key {key}")
        return self.keys[key]

    def error(
        self, why: str, instead: str = "take another file of this model, or its Hugging Face folder"
    ) -> UserError:
        """Returns the error that says why the file cannot be read, and what to do instead."""
        return UserError(f"model.path={self.path}: {why}; {instead}")


def check_name(path: Path) -> None:
    """Raises UserError if a name is that of one part of a model that was split into several files."""
    part = _PART_NUMBER.search(path.name)
    if part and int(part[2]) > 1:
        raise UserError(
            f"model.path={path} is part {int(part[1])} of {int(part[2])} of a model; join the parts first: "
            f"llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )


def open_gguf(path: Path) -> File:
    """Opens the GGUF file at `path`.

    Raises:
        UserError: the file is not a GGUF file, is truncated or damaged, is a part of a model, or is not a language model.
        MissingExtra: gguf is not installed.
    """
    check_name(path)
    with path.open("rb") as data:
        magic = data.read(4)
    if magic != MAGIC:
        raise UserError(
            f"model.path={path} is not a GGUF file: it begins with {magic!r}; give a folder, a hub id or a .gguf"
        )
    require("gguf")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise UserError(
            f"model.path={path} is cut short or damaged ({path.stat().st_size:,} bytes; {str(error).splitlines()[0]}); "
            f"download it again"
        ) from error
    file = File(path, keys, {tensor.name: tensor for tensor in reader.tensors})
    if reader.byte_order != "I":
        raise file.error("its numbers are in the byte order of another kind of machine")
    if keys.get("split.count", 0) > 1:
        raise UserError(
            f"model.path={path} is one of {keys['split.count']} parts of a model; join them first: "
            f"llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if keys.get("general.type", "model") != "model":
        raise file.error(f"it holds a part of another kind (general.type={keys['general.type']}), not a language model")
    return file
