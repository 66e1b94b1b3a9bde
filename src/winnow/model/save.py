"""Writes an artifact: a Hugging Face folder plus `manifest.json`, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from winnow.core.errors import UserError, is_disk_full
from winnow.model import manifest as manifests
from winnow.model.lm import LM


@contextlib.contextmanager
def whole_folder(output: Path, option: str = "output", elsewhere: str = "output= or outputs=") -> Iterator[Path]:
    """A scratch folder beside `output` that takes its name when the block ends well, and vanishes when it does not.

    `option` and `elsewhere` say in messages what put `output` there, and what puts it in another place.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    scratch = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _sync(scratch)
        old = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.old"
        if output.exists():
            output.rename(old)
        scratch.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        remove_empty(output.parent, until=existing)
        if is_disk_full(error):
            raise UserError(
                f"{option}={output}: the disk is full; free some space or choose another place with {elsewhere}"
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(
                f"{option}={output}: not allowed to write there ({error}); choose another place with {elsewhere}"
            ) from error
        raise


def remove_empty(folder: Path, until: Path) -> None:
    """Removes a folder and its parents as long as they are empty, up to and without `until`."""
    folder = folder.absolute()
    with contextlib.suppress(OSError):  # a mount point, say
        while folder != until and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors makes files that only their owner can read


def save(lm: LM, output: Path) -> LM:
    """Saves weights, tokenizer and manifest to `output`; returns the LM that lies there, not in memory.

    The model in memory is spent: packing its weights is done in place.
    """
    with whole_folder(output) as scratch:
        if lm.final:
            assert lm.path is not None
            shutil.copytree(lm.path, scratch, dirs_exist_ok=True)
        else:
            _write_weights(lm, scratch)
        lm.tokenizer.save_pretrained(scratch)
        manifest = {
            **lm.manifest,
            "stages": lm.manifest.get("stages", []),
            "versions": manifests.versions(),
            **manifests.described(scratch),
        }
        manifests.write(scratch, manifest)
    return LM(output, manifest=manifest, loading=lm.loading, name=lm.name)


def _write_weights(lm: LM, folder: Path) -> None:
    from winnow.model import adapter, packing, unfused
    from winnow.model.load import quiet

    for name, parameter in lm.model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was repacked for this processor by a forward pass; load the model again to save it"
            )
    model = lm.model
    with quiet():
        if adapter.is_adapted(model):
            adapter.write(model, folder / adapter.NAME, model.dtype)
            model = adapter.taken_off(model)
        compressor = packing.pack(model) if packing.is_packable(model) else None
        with unfused.fused(model):
            model.save_pretrained(folder)
    if compressor is not None:
        compressor.update_config(folder)
