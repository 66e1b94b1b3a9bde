"""Reads and writes `manifest.json`, which records the origin of an artifact.

The manifest is written last: a folder is an artifact if and only if it holds one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.files import write_json
from winnow.core.hashes import sha256
from winnow.model.folder import content_files, decides_weights, is_weights

NAME = "manifest.json"
logger = logging.getLogger(__name__)
_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "compressed-tensors", "llmcompressor", "auto-round", "hqq", "gguf",
    "llama-cpp-python", "lightning", "winnow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the installed versions of the libraries that affect an artifact's content."""
    installed = {}
    for library in _LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return installed


def sizes(folder: Path) -> dict[str, int]:
    """Returns `size_bytes` of all files needed to load the model, and `weight_bytes` of its weight files."""
    files = {name: path.stat().st_size for name, path in content_files(folder).items()}
    return {
        "size_bytes": sum(files.values()),
        "weight_bytes": sum(size for name, size in files.items() if is_weights(name)),
    }


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of the model, by name."""
    return {name: sha256(path) for name, path in content_files(folder).items()}


def content_hash(folder: Path) -> str:
    """Returns the model's identity: one SHA-256 over the names and contents of all its files."""
    return combined_hash(hashes(folder))


def combined_hash(files: Mapping[str, str]) -> str:
    """Returns the hash of a model, computed from the hashes of its files."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns a manifest's entries on the files in its folder: `sizes`, `files` (their hashes) and `sha256` of all.

    Args:
        files: hashes of the files, if they are already computed.
    """
    files = files or hashes(folder)
    return {"sizes": sizes(folder), "files": files, "sha256": combined_hash(files)}


def read(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a folder; returns an empty dict if there is none (winnow did not write the model).

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


def read_verified(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a folder and compares it with the files there; a warning names the files that changed.

    If weights or configuration changed, the folder holds another model and the result is empty.

    Raises:
        UserError: the manifest cannot be read.
    """
    manifest = read(folder)
    recorded = manifest.get("files")
    if recorded is None:
        return manifest
    current = hashes(folder)
    changed = sorted(name for name in {*recorded, *current} if recorded.get(name) != current.get(name))
    if not changed:
        return manifest
    is_other_model = any(map(decides_weights, changed))
    consequence = (
        "it is another model, and its manifest is not used" if is_other_model else "its figures are not that artifact's"
    )
    logger.warning(f"{folder}: {', '.join(changed)} changed since winnow wrote the artifact; {consequence}")
    return {} if is_other_model else {**manifest, **describe_files(folder, current)}


def write(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / NAME, manifest, default=str)
