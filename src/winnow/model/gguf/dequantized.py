"""A GGUF file as a folder of transformers: dequantized once, and kept for whoever asks for the same file again.

The folders lie under `$WINNOW_CACHE/models`, else `$XDG_CACHE_HOME/winnow/models`, else `~/.cache/winnow/models`, each under the
SHA-256 of the file and of the code that reads it. A folder may be deleted at any time: it is made again. It takes 2 bytes a
weight, 4 for a file in single precision; one tensor at a time is in memory.

    python compress.py model=local model.path=FILE.gguf method=[rtn]
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.files import cache_root, sha256, whole_folder, write_json
from winnow.model import manifest
from winnow.model.gguf.file import check_name
from winnow.model.loading import Loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from winnow.model.gguf.file import File
    from winnow.model.gguf.read import Weights

READERS = (
    "architectures.py",
    "dequantized.py",
    "file.py",
    "read.py",
    "read_vocabulary.py",
    "splits.py",
    "vocabulary.py",
)
PATIENCE_S = 2.0  # a conversion that takes longer is worth a line
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of safetensors


def folder_of(file: Path, dequantize: bool = True) -> Path:
    """The folder that a GGUF file was read to; it is made where it is not there.

    Without `dequantize` it is one as `method=[gguf]` leaves it, with a link to the file itself: what llama.cpp serves.

    Raises:
        UserError: the file cannot be read (see `winnow.model.gguf.read`), or the cache cannot be written.
        MissingExtra: gguf is not installed.
    """
    check_name(file)
    digest = sha256(file)
    made = cache_root() / "models" / f"{_plain(file.stem)}-{digest[:16]}-{_version()}{'' if dequantize else '-file'}"

    def there() -> bool:
        linked = dequantize or (made / file.name).resolve() == file.resolve()
        return linked and (made / manifest.NAME).is_file()

    if not there():
        with _locked(made):
            if not there():  # another process may have made it meanwhile
                _read(file, digest, made, dequantize)
    return made


@functools.cache
def _version() -> str:
    """Of the code that reads: what another one has made may not be what this one makes."""
    digest = hashlib.sha256()
    for name in READERS:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:8]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:64] or "model"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held while a folder is made, so that two processes do not both make it; given up when this one dies."""
    with _allowed():
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache_root()} cannot be written ({error.strerror}); set WINNOW_CACHE to a folder that can"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    with whole_folder(folder, option="the cache", elsewhere="WINNOW_CACHE") as scratch:
        yield scratch


def _read(file: Path, digest: str, target: Path, dequantize: bool) -> None:
    from winnow.model.gguf import read, read_vocabulary
    from winnow.model.gguf.file import opened
    from winnow.model.quiet import quiet

    contents = opened(file)
    with quiet():
        config = read.configuration(contents)
        dtype = read.dtype_of(contents)
        name = str(dtype).removeprefix("torch.")
        config.dtype = dtype
        tokenizer = read_vocabulary.tokenizer_in(contents)
        weights = read.Weights(contents, config)
    size = dtype.itemsize * sum(math.prod(shape) for shape in weights.shapes.values())
    free = shutil.disk_usage(target.parent).free
    if dequantize and free < size:
        raise UserError(
            f"model.path={file} takes {size / 1e9:.1f} GB as {_NAMES[name]}, and {cache_root()} has {free / 1e9:.1f} GB left; "
            f"free some space, or set WINNOW_CACHE to another place"
        )
    with _writing(target) as folder, quiet():
        rounding: dict[str, Any] = {}
        if dequantize:
            rounding = {"dtype": name, **_write_weights(weights, name, folder / "model.safetensors", file)}
        else:
            (folder / file.name).symlink_to(file.resolve())
        config.architectures = [type(weights.model).__name__]
        config.save_pretrained(folder)
        ends = read_vocabulary.end_ids(contents)
        ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "pad")}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
        tokenizer.save_pretrained(folder)
        _check_tokenizer(tokenizer, folder, contents)
        held = {
            "origin": {"file": file.name, "sha256": digest, **_description(contents), **rounding},
            "versions": manifest.versions(),
            **manifest.described(folder),
        }
        manifest.write(folder, held)


def _check_tokenizer(made: PreTrainedTokenizerBase, folder: Path, file: File) -> None:
    """Raises UserError where transformers loads another tokenizer than was saved: it has one of its own for some models."""
    from winnow.model.gguf.vocabulary import SAMPLES
    from winnow.model.load import load_tokenizer

    loaded = load_tokenizer(str(folder), Loading())
    if any(loaded(text).input_ids != made(text).input_ids for text in SAMPLES):
        raise file.refused(
            f"transformers loads the tokenizer of a {file.architecture} as {type(loaded).__name__}, which gives other ids than "
            f"the one in the file (tokenizer.ggml.pre={file.keys.get('tokenizer.ggml.pre')})"
        )


def _description(file: File) -> dict[str, Any]:
    kinds = Counter(tensor.tensor_type.name for tensor in file.tensors.values())
    named = {"architecture": file.architecture, "name": file.keys.get("general.name")}
    return {**named, "license": file.keys.get("general.license"), "tensor_types": dict(sorted(kinds.items()))}


def _write_weights(weights: Weights, dtype: str, target: Path, source: Path) -> dict[str, Any]:
    """Writes a safetensors file a part of a tensor at a time (8 bytes of length, JSON header, data).

    Returns how many tensors `dtype` could not hold as they were, and the size of what was lost relative to all weights.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in weights.shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    progress = _Progress(source, end)
    rounded, lost, whole = 0, 0.0, 0.0
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in weights.shapes:
            exact = True
            for part in weights[name]:
                kept = part.to(kind)
                if not kept.isfinite().all():
                    raise weights.file.refused(f"its tensor of {name} holds NaN, infinity or what {dtype} cannot")
                difference = kept.float() - part
                lost += float(difference.square().sum(dtype=torch.float64))
                whole += float(part.square().sum(dtype=torch.float64))
                exact &= not difference.any()
                out.write(kept.contiguous().view(torch.uint8).numpy().data)
                progress.add(kept.nbytes)
            rounded += not exact
    progress.end()
    return {"rounded_tensors": rounded, "rounding_error": float(f"{math.sqrt(lost / whole) if whole else 0.0:.3g}")}


@dataclasses.dataclass
class _Progress:
    """Lines on standard error for a conversion that takes a while."""

    source: Path
    total: int
    done: int = 0
    said: float = dataclasses.field(default_factory=time.monotonic)
    spoke: bool = False

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.said > (10 if self.spoke else PATIENCE_S):
            self._say(f"{self.done / self.total:.0%}")

    def end(self) -> None:
        if self.spoke:
            self._say("done")

    def _say(self, what: str) -> None:
        self.said, self.spoke = time.monotonic(), True
        print(f"reading {self.source.name} into {cache_root()}: {what}", file=sys.stderr, flush=True)
