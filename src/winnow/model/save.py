"""Writes an artifact, a Hugging Face folder with `manifest.json`, atomically."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from winnow.core.files import atomic_folder
from winnow.model import manifest as manifests
from winnow.model.lm import LM, FileLM


def save(lm: LM, output: Path) -> LM:
    """Saves weights, tokenizer and manifest to `output`; returns an LM for that folder, not loaded into memory.

    The model in memory must not be used afterwards: its weights are packed in place.
    """
    with atomic_folder(output) as scratch:
        if isinstance(lm, FileLM):
            shutil.copytree(lm.path, scratch, dirs_exist_ok=True)
        else:
            _write_weights(lm, scratch)
        lm.tokenizer.save_pretrained(scratch)
        manifest = {
            **lm.manifest,
            "stages": lm.manifest.get("stages", []),
            "versions": manifests.versions(),
            **manifests.describe_files(scratch),
        }
        manifests.write(scratch, manifest)
    return LM(output, manifest=manifest, loading=lm.loading, name=lm.name)


def _write_weights(lm: LM, folder: Path) -> None:
    from winnow.model import adapter, packing, unfused
    from winnow.model.quiet import quiet

    for name, parameter in lm.model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was repacked for this processor by a forward pass; load the model again to save it"
            )
    model = lm.model
    with quiet():
        if adapter.is_adapted(model):
            adapter.write(model, folder / adapter.NAME, model.dtype)
            model = adapter.without_adapter(model)
        compressor = packing.pack(model) if packing.is_packable(model) else None
        with unfused.fused(model):
            model.save_pretrained(folder)
    if compressor is not None:
        compressor.update_config(folder)


def attach_adapter(lm: LM, model: Any) -> LM:
    """Returns an LM with the adapter of `model`: in memory, or written next to the files of a `FileLM`."""
    from winnow.model.adapter import NAME, base_model, write

    if not isinstance(lm, FileLM):
        return lm.with_model(model)
    write(model, Path(lm.path) / NAME, base_model(model).dtype)
    return lm.with_files(lm.path)
