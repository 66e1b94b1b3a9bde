"""`manifest.json`: where an artifact comes from. Its presence, written last, is what makes a folder an artifact."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.files import sha256, write_json
from winnow.model.folder import content_files, decides_weights, is_weights

NAME = "manifest.json"
_LOG = logging.getLogger(__name__)
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


def sizes(folder: Path) -> dict[str, int]:
    """`size_bytes` on disk of everything that must be there to load the model, and `weight_bytes` of its weights."""
    files = {name: path.stat().st_size for name, path in content_files(folder).items()}
    return {
        "size_bytes": sum(files.values()),
        "weight_bytes": sum(size for name, size in files.items() if is_weights(name)),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that is part of the model, by name."""
    return {name: sha256(path) for name, path in content_files(folder).items()}


def content_hash(folder: Path) -> str:
    """What a model is known by: SHA-256 over the names and contents of all files that decide what it answers."""
    return hash_of(hashes(folder))


def hash_of(files: Mapping[str, str]) -> str:
    """Of a whole model, from the hashes of its files."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def described(folder: Path, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a manifest says of the files that lie beside it: `sizes`, `files` (the hash of each) and `sha256` of them all.

    `files`: the hashes, where they are known.
    """
    files = files or hashes(folder)
    return {"sizes": sizes(folder), "files": files, "sha256": hash_of(files)}


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


def checked(folder: Path) -> dict[str, Any]:
    """The manifest of a folder as far as it is of the files that lie there now; a warning says what has changed since.

    Where weights or configuration have, it is another model's: nothing of it is used.

    Raises:
        UserError: the manifest cannot be read.
    """
    manifest = read(folder)
    written = manifest.get("files")
    if written is None:
        return manifest
    now = hashes(folder)
    changed = sorted(name for name in {*written, *now} if written.get(name) != now.get(name))
    if not changed:
        return manifest
    other = any(map(decides_weights, changed))
    consequence = (
        "it is another model, and its manifest is not used" if other else "its figures are not that artifact's"
    )
    _LOG.warning(f"{folder}: {', '.join(changed)} changed since winnow wrote the artifact; {consequence}")
    return {} if other else {**manifest, **described(folder, now)}


def write(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / NAME, manifest, default=str)
