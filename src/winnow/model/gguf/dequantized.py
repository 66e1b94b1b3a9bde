"""Converts a GGUF file to a transformers folder once, and caches the folder.

The folders lie under `$WINNOW_CACHE/models`, else `$XDG_CACHE_HOME/winnow/models`, else `~/.cache/winnow/models`. Their names hold
the SHA-256 of the file and of the code that reads it. A folder may be deleted at any time; it is then created again. It takes 2
bytes per weight, or 4 for a file in single precision; one tensor at a time is in memory.

    python compress.py model=local model.path=FILE.gguf method=[rtn]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.cache import Cache, cache_root
from winnow.core.errors import UserError
from winnow.core.files import atomic_folder, write_json
from winnow.core.hashes import sha256
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
PATIENCE_S = 2.0  # a longer conversion reports its progress
_TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch dtype -> its name in safetensors


def folder_of(file: Path, dequantize: bool = True) -> Path:
    """Returns the cached folder of a GGUF file, and creates it if needed.

    Without `dequantize` the folder is like the result of `method=[gguf]`, with a link to the file, which llama.cpp serves.

    Raises:
        UserError: the file cannot be read (see `winnow.model.gguf.read`), or the cache cannot be written.
        MissingExtra: gguf is not installed.
    """
    check_name(file)
    digest = sha256(file)
    cache = Cache(cache_root() / "models")
    name = f"{_safe_name(file.stem)}-{digest[:16]}-{_reader_version()}{'' if dequantize else '-file'}"
    folder = cache.folder / name

    def check_entry(entry: Path) -> Path:
        linked = dequantize or (entry / file.name).resolve() == file.resolve()
        if not (linked and (entry / manifest.NAME).is_file()):
            raise ValueError(f"{entry} is incomplete, or links to another file")
        return entry

    if cache.read(folder, check_entry) is None:
        with contextlib.ExitStack() as stack:
            with _cache_errors():
                stack.enter_context(cache.computing(folder))
            if cache.read(folder, check_entry) is None:  # another process may have created it in the meantime
                _convert(file, digest, folder, dequantize)
    return folder


@functools.cache
def _reader_version() -> str:
    """Returns a hash of the code that reads GGUF files, because other code may give another result."""
    digest = hashlib.sha256()
    for name in READERS:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:8]


def _safe_name(name: str) -> str:
    """Returns a name that is safe as a part of a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:64] or "model"


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    """Turns an OSError into a UserError about the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache_root()} cannot be written ({error.strerror}); set WINNOW_CACHE to a folder that can"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    with atomic_folder(folder, option="the cache", elsewhere="WINNOW_CACHE") as scratch:
        yield scratch


def _convert(file: Path, digest: str, output: Path, dequantize: bool) -> None:
    from winnow.model.gguf import read, read_vocabulary
    from winnow.model.gguf.file import open_gguf
    from winnow.model.quiet import quiet

    contents = open_gguf(file)
    with quiet():
        config = read.read_config(contents)
        dtype = read.dtype_of(contents)
        name = str(dtype).removeprefix("torch.")
        config.dtype = dtype
        tokenizer = read_vocabulary.read_tokenizer(contents)
        weights = read.Weights(contents, config)
    size = dtype.itemsize * sum(math.prod(shape) for shape in weights.shapes.values())
    free = shutil.disk_usage(output.parent).free
    if dequantize and free < size:
        raise UserError(
            f"model.path={file} takes {size / 1e9:.1f} GB as {_TYPE_NAMES[name]}, and {cache_root()} has {free / 1e9:.1f} GB left; "
            f"free some space, or set WINNOW_CACHE to another place"
        )
    with _writing(output) as folder, quiet():
        rounding: dict[str, Any] = {}
        if dequantize:
            rounding = {"dtype": name, **_write_weights(weights, name, folder / "model.safetensors", file)}
        else:
            (folder / file.name).symlink_to(file.resolve())
        config.architectures = [type(weights.model).__name__]
        config.save_pretrained(folder)
        end_ids = read_vocabulary.end_ids(contents)
        ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "pad")}
        ids["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else end_ids or None
        write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
        tokenizer.save_pretrained(folder)
        _check_tokenizer(tokenizer, folder, contents)
        record = {
            "origin": {"file": file.name, "sha256": digest, **_description(contents), **rounding},
            "versions": manifest.versions(),
            **manifest.describe_files(folder),
        }
        manifest.write(folder, record)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, file: File) -> None:
    """Raises UserError if transformers loads another tokenizer than was saved: it has its own one for some models."""
    from winnow.model.gguf.vocabulary import SAMPLES
    from winnow.model.load import load_tokenizer

    loaded = load_tokenizer(str(folder), Loading())
    if any(loaded(text).input_ids != tokenizer(text).input_ids for text in SAMPLES):
        raise file.error(
            f"transformers loads the tokenizer of a {file.architecture} as {type(loaded).__name__}, which gives other ids than "
            f"the one in the file (tokenizer.ggml.pre={file.keys.get('tokenizer.ggml.pre')})"
        )


def _description(file: File) -> dict[str, Any]:
    type_counts = Counter(tensor.tensor_type.name for tensor in file.tensors.values())
    fields = {"architecture": file.architecture, "name": file.keys.get("general.name")}
    return {**fields, "license": file.keys.get("general.license"), "tensor_types": dict(sorted(type_counts.items()))}


def _write_weights(weights: Weights, dtype: str, target: Path, source: Path) -> dict[str, Any]:
    """Writes a safetensors file in parts of tensors (8 bytes of length, JSON header, data).

    Returns the number of tensors that `dtype` cannot hold exactly, and the norm of the error relative to that of all weights.
    """
    import torch

    torch_dtype: torch.dtype = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in weights.shapes.items():
        start, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded_header = json.dumps(header).encode()
    encoded_header += b" " * (-len(encoded_header) % 8)
    progress = _Progress(source, end)
    rounded_tensors, squared_error, squared_norm = 0, 0.0, 0.0
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded_header)) + encoded_header)
        for name in weights.shapes:
            is_exact = True
            for part in weights[name]:
                stored = part.to(torch_dtype)
                if not stored.isfinite().all():
                    raise weights.file.error(f"its tensor of {name} holds NaN, infinity or what {dtype} cannot")
                difference = stored.float() - part
                squared_error += float(difference.square().sum(dtype=torch.float64))
                squared_norm += float(part.square().sum(dtype=torch.float64))
                is_exact &= not difference.any()
                out.write(stored.contiguous().view(torch.uint8).numpy().data)
                progress.add(stored.nbytes)
            rounded_tensors += not is_exact
    progress.end()
    return {
        "rounded_tensors": rounded_tensors,
        "rounding_error": float(f"{math.sqrt(squared_error / squared_norm) if squared_norm else 0.0:.3g}"),
    }


@dataclasses.dataclass
class _Progress:
    """Reports the progress of a long conversion on standard error."""

    source: Path
    total: int
    done: int = 0
    last_report: float = dataclasses.field(default_factory=time.monotonic)
    has_reported: bool = False

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last_report > (10 if self.has_reported else PATIENCE_S):
            self._report(f"{self.done / self.total:.0%}")

    def end(self) -> None:
        if self.has_reported:
            self._report("done")

    def _report(self, what: str) -> None:
        self.last_report, self.has_reported = time.monotonic(), True
        print(f"reading {self.source.name} into {cache_root()}: {what}", file=sys.stderr, flush=True)
