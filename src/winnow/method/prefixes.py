"""Caches the artifacts of a pipeline's first stages, so that the next pipeline with the same first stages continues from them.

`[wanda,lora,gptq]` at 4 and at 3 bits prunes and recovers once. An entry's key covers all that its content depends on: the base
model's content, the stages with all of their knobs, the seed, the calibration data, and the code of winnow and of the
libraries. An entry is an ordinary artifact, and continuing from it equals `model.path=` of that artifact. The least recently
used entries are removed when the cache exceeds its limit in bytes.

Processes may share a folder of entries, which are locked while a process reads them (`winnow.core.cache`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.core.cache import Cache, stored_bytes
from winnow.core.errors import UserError
from winnow.core.hashes import sha256
from winnow.core.types import Slot
from winnow.data import corpus
from winnow.hardware.run import Run
from winnow.method.knobs import Stage
from winnow.model import adapter, manifest
from winnow.model.lm import LM, FileLM

FOLDER = "prefixes"
DISK_BYTES_PER_SECOND = 200e6  # an artifact that is computed faster than a slow disk writes it is not worth caching


@dataclass(frozen=True)
class PrefixCache:
    """The cached artifacts of one pipeline on one base model.

    Attributes:
        cache: the entries of all pipelines.
        earlier_stages: number of stages that the base model's own manifest already lists.
    """

    cache: Cache
    lm: LM
    stages: Mapping[str, Stage]
    run: Run
    earlier_stages: int

    @contextlib.contextmanager
    def longest_cached(self) -> Iterator[LM | None]:
        """Yields the cached artifact of the longest prefix that the other stages can continue from, locked meanwhile."""
        for count in range(len(self.stages), 0, -1):
            with self.cache.reading(self.entry(count), functools.partial(self._load, count)) as artifact:
                if artifact is not None:
                    yield artifact
                    return
        yield None

    def _load(self, count: int, entry: Path) -> LM | None:
        """Returns the artifact with its stage records marked as reused; None if a later stage needs dense weights it lacks.

        An artifact shares its files with its entry by hard links, so an entry whose files were changed is damaged.
        """
        remaining = list(self.stages.values())[count:]
        fields = manifest.read(entry)
        if fields.get("files") != manifest.hashes(entry):
            raise ValueError(f"{entry}: its files were changed")
        dense = fields.pop("dense")
        if remaining and remaining[0].slot < Slot.CACHE and not dense:
            return None
        records = [dict(record, reused=True) for record in fields["stages"][self.earlier_stages :]]
        fields = {**fields, "stages": [*fields["stages"][: self.earlier_stages], *records]}
        return LM(entry, manifest=fields, loading=self.lm.loading, name=self.lm.name)

    def store(self, lm: LM) -> None:
        """Caches the result of the stages so far, in memory or as an artifact, if that is worth its bytes."""
        from winnow.model.save import save

        records = lm.manifest["stages"][self.earlier_stages :]
        entry = self.entry(len(records))
        seconds = sum(record["seconds"] for record in records if not record.get("reused"))
        on_disk = lm.path is not None and not isinstance(lm, FileLM)
        dense = not isinstance(lm, FileLM) and is_dense(lm)
        size = stored_bytes(Path(str(lm.path))) if on_disk else sum(p.nbytes for p in lm.model.parameters())
        if entry.is_dir() or not self.cache.fits(size) or seconds < size / DISK_BYTES_PER_SECOND:
            return
        if not (on_disk or dense):
            return  # saving would pack the weights, which the next stage needs unpacked
        # another process may be faster, or the disk full: the pipeline continues uncached
        with contextlib.suppress(OSError, UserError), self.cache.writing(entry, expected_bytes=size) as scratch:
            if on_disk:
                shutil.copytree(str(lm.path), scratch, copy_function=_link)
            else:
                save(lm, scratch)
            manifest.write(scratch, {**lm.manifest, **manifest.read(scratch), "dense": dense})

    def entry(self, count: int) -> Path:
        """Returns the path of the entry for the result of the first `count` stages, by all that it depends on."""
        applied = list(self.stages.items())[:count]
        run = self.run
        fields = {
            "base": [self.lm.sha256(), self.lm.loading.dtype, self.lm.loading.attention],
            "stages": [[name, type(stage).__qualname__, dataclasses.asdict(stage)] for name, stage in applied],  # type: ignore[call-overload]
            "models": [_content(value) for _, stage in applied for value in vars(stage).values()],
            "calibration": [dataclasses.asdict(run.calibration), corpus.content(run.calibration)],
            "run": [run.seed, run.device, run.compute_dtype, run.devices, run.parallel],
            "versions": manifest.versions(),
            "code": code_sha256("method", "training", "data", "model", "nano"),
        }
        return self.cache.entry(fields)


def prefix_cache(lm: LM, stages: Mapping[str, Stage], run: Run) -> PrefixCache:
    """Returns the cache for `stages` on `lm`; it stores nothing if the run has no cache folder or the model has no hash."""
    limit = run.stage_cache_bytes if lm.sha256() is not None and run.cache is not None else 0
    earlier_stages = len(lm.manifest.get("stages", []))
    cache = Cache((run.cache or run.folder) / FOLDER, limit_bytes=limit)
    return PrefixCache(cache, lm, stages, run, earlier_stages)


def link_artifact(artifact: LM, output: Path) -> LM:
    """Puts the same artifact at `output`, with hard links to its files where the disk allows them."""
    from winnow.core.files import atomic_folder

    with atomic_folder(output) as folder:
        shutil.copytree(str(artifact.path), folder, dirs_exist_ok=True, copy_function=_link)
        manifest.write(folder, artifact.manifest)
    return LM(output, manifest=manifest.read(output), loading=artifact.loading, name=artifact.name)


def is_dense(lm: LM) -> bool:
    """Returns whether further stages can change the weights: they are not quantized and have no adapter."""
    from winnow.model import packing
    from winnow.model.folder_checks import gguf_file

    if lm.path is not None:
        quantized = getattr(lm.config(), "quantization_config", None) is not None
        return not quantized and gguf_file(Path(lm.path)) is None and adapter.folder_of(lm.path) is None
    quantized = getattr(lm.model.config, "quantization_config", None) is not None
    return not (quantized or adapter.is_adapted(lm.model) or packing.is_packable(lm.model))


@functools.cache
def code_sha256(*folders: str) -> str:
    """Returns the SHA-256 of winnow's own modules in these folders of the package."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted((package / folder).rglob("*.py"))
        if not files:
            raise ValueError(f"there is no folder {folder} in {package}")
        for path in files:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _link(source: str, target: str) -> None:
    """Hard-links a file, or copies it if the target is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _content(value: Any) -> str | None:
    """Returns the content hash of a path, None for other values: a teacher or calibration data may change in place."""
    if not isinstance(value, str) or not value:
        return None
    path = Path(value)
    if path.is_dir() and (path / "config.json").is_file():
        return manifest.content_hash(path)
    if path.is_file():
        return sha256(path)
    return None
