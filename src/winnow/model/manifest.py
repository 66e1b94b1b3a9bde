"""`manifest.json`: where an artifact comes from. Its presence, written last, is what makes a folder an artifact."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from winnow.files import write_json
from winnow.types import UserError

NAME = "manifest.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "compressed-tensors", "llmcompressor", "auto-round", "hqq", "gguf",
    "llama-cpp-python", "lightning", "winnow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The installed versions of the libraries that decide what an artifact holds."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def content_files(folder: Path) -> list[Path]:
    """The files of a model folder that are part of the model: all but the manifest and the model card."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (NAME, "README.md"))


def sizes(folder: Path) -> dict[str, int]:
    """`size_bytes` on disk of everything that must be there to load the model, and `weight_bytes` of its weights."""
    files = content_files(folder)
    return {
        "size_bytes": sum(p.stat().st_size for p in files),
        "weight_bytes": sum(p.stat().st_size for p in files if p.suffix in WEIGHT_SUFFIXES),
    }


def content_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the configuration and the weights: what the model computes, and no more."""
    digest = hashlib.sha256()
    for path in content_files(folder):
        if path.suffix in WEIGHT_SUFFIXES or path.name in ("config.json", "adapter_config.json"):
            digest.update(path.name.encode())
            found = path.stat()
            digest.update(_sha256(path, found.st_ino, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, *version: int) -> bytes:
    """Of a file's content, read once for each version of it: a trial asks several times, and large models take a while."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none (a model that winnow did not write).

    Raises:
        UserError: the manifest cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); make the artifact again, or delete the file") from error
    return manifest


def write(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / NAME, manifest, default=str)
