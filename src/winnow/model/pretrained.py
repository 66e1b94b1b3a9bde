"""Opens a model by folder, hub id or GGUF file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from winnow.core.errors import UserError
from winnow.core.scalars import check_scalars
from winnow.model import manifest
from winnow.model.folder_checks import check_folder, gguf_file
from winnow.model.lm import LM
from winnow.model.loading import Loading


def pretrained(
    path: str | None,
    name: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    dequantize: bool = True,
) -> LM:
    """Opens a model by folder, hub id or GGUF file, without loading it into memory; a folder is checked at once.

    A GGUF file, or a folder with a GGUF file and no configuration, is converted to a folder in the cache, and that is loaded
    (`winnow.model.gguf.dequantized`); without `dequantize` the file stays as it is, for llama.cpp. Without `weights` only the
    configuration is used, and the folder may hold nothing else.

    Raises:
        UserError: there is no path, the folder holds no complete model (see `check_folder`), or the file cannot be read.
    """
    if not path:
        raise UserError("model.path is not set; give a folder, a hub id or a GGUF file: model=local model.path=...")
    loading = Loading(dtype, attention, device, trust_remote_code, allow_pickle)
    check_scalars(Loading, dataclasses.asdict(loading), "model")
    folder = Path(path)
    file = folder if folder.is_file() else None if (folder / "config.json").is_file() else gguf_file(folder)
    if file is not None:
        from winnow.model.gguf import dequantized

        name = name or file.stem
        folder = dequantized.folder_of(file, dequantize and weights)
    if folder.is_dir():
        check_folder(folder, loading, weights)
        return LM(folder, manifest=manifest.read_verified(folder), loading=loading, name=name or folder.resolve().name)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise UserError(f"model.path={path}: no such folder or file")
    return LM(path, loading=loading, name=name or path.split("/")[-1])
