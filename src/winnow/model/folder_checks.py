"""Checks that a folder holds a complete model before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.model import adapter, generation, own_architectures
from winnow.model.folder import INDEX, WEIGHTS, header_of, weight_files
from winnow.model.loading import Loading

_QUANTIZED_WITH = {
    "auto-round": "auto_round",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def check_folder(folder: Path, loading: Loading, need_weights: bool = True) -> None:
    """Raises an error for a folder that transformers cannot load or that would run third-party code.

    Raises:
        UserError: no configuration, no weights, truncated weights, pickle weights, or a model with its own code.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model.path={folder} is not a model folder: it has no config.json and no .gguf file")
    settings = check_json(config)
    # winnow's classes load it, not the folder's code
    is_own_architecture = settings.get("model_type") in own_architectures.MODEL_TYPES
    if settings.get("auto_map") and not is_own_architecture and not loading.trust_remote_code:
        raise UserError(
            f"model.path={folder} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
        )
    if not need_weights:
        return
    for name in (generation.FILE, "tokenizer_config.json"):
        check_json(folder / name)
    _require_libraries(folder, settings)
    adapter_folder = adapter.folder_of(folder)
    if adapter_folder is not None:
        adapter.check(adapter_folder)
    weights = weight_files(folder)
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise UserError(f"model.path={folder} is incomplete: {', '.join(missing)} is missing; copy the model again")
    if not weights:
        ignored_files = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".pkl")
        )
        hint = f", and transformers does not look at {', '.join(ignored_files[:3])}" if ignored_files else ""
        raise UserError(f"model.path={folder} is incomplete: it holds no weights ({WEIGHTS} or {INDEX}){hint}")
    if weights[0].suffix == ".bin" and not loading.allow_pickle:
        raise UserError(
            f"model.path={folder} holds pickle weights ({', '.join(file.name for file in weights)}), which can run code when "
            f"loaded; convert them to safetensors, or set model.allow_pickle=true if you trust them"
        )
    for file in [*weights, *(adapter_folder.glob("*.safetensors") if adapter_folder else ())]:
        try:
            if file.suffix == ".safetensors":
                header_of(file)
        except ValueError as error:
            raise UserError(
                f"model.path={folder} is half-written: {file.name} is cut short ({error}); copy or make it again"
            ) from error
    if not has_tokenizer(folder):
        raise UserError(no_tokenizer(folder))


def check_json(file: Path) -> dict[str, Any]:
    """Loads a JSON settings file; returns an empty dict if it is missing.

    Raises:
        UserError: the file is damaged; transformers silently ignores some damaged files.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(
            f"model.path={file.parent}: its {file.name} is damaged ({error}); copy the model again"
        ) from error
    return settings


def gguf_file(folder: Path) -> Path | None:
    """Returns the GGUF file with a folder's weights, which llama.cpp serves and transformers does not load; else None.

    Raises:
        UserError: the folder holds several GGUF files.
    """
    files = [file for file in weight_files(folder) if file.suffix == ".gguf"]
    if len(files) > 1:
        raise UserError(
            f"model.path={folder} holds {len(files)} GGUF files ({files[0].name}, {files[1].name}, ...); "
            f"leave the one that is to be used"
        )
    return files[0] if files else None


def _require_libraries(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises MissingExtra if a library that unpacks the weights or the KV cache is not installed."""
    method = (settings.get("quantization_config") or {}).get("quant_method")
    if method in _QUANTIZED_WITH:
        require(_QUANTIZED_WITH[method])
    generation = folder / "generation_config.json"
    if generation.is_file() and '"hqq"' in generation.read_text(encoding="utf-8"):  # backend of the quantized KV cache
        require("hqq")


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder holds a tokenizer file."""
    return any((folder / name).is_file() for name in TOKENIZERS) or any(folder.glob("*.tiktoken"))


def no_tokenizer(folder: Path) -> str:
    """Returns the message for a folder without a tokenizer."""
    return (
        f"model.path={folder} holds no tokenizer ({', '.join(TOKENIZERS[:3])}, ...); "
        f"copy the tokenizer files of the model that it was made of into it"
    )
