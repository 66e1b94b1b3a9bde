"""Artifacts of the beginnings of pipelines, kept so that the next pipeline that begins alike goes on from there.

`[wanda,lora,gptq]` at 4 and at 3 bits prunes and recovers once. What was kept is found by what made it: the base model's
content, the stages with all of their knobs, the seed, the calibration data, and the code, winnow's and the libraries'. An entry
is an ordinary artifact, and going on from it is what `model.path=` of that artifact would do. The least recently used ones
go first where there are more bytes than allowed.

Processes may share a folder of entries: one is moved into its place whole, and is locked while somebody reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.core.files import sha256
from winnow.core.types import Slot
from winnow.data import corpus
from winnow.hardware.run import Run
from winnow.method.knobs import Stage
from winnow.model import adapter, manifest
from winnow.model.lm import LM

FOLDER = "prefixes"
DISK_BYTES_PER_SECOND = 200e6  # what is made faster than a slow disk writes it is not worth keeping


@dataclass(frozen=True)
class Prefixes:
    """What is kept of one pipeline on one base model.

    Attributes:
        before: stages that the base model had behind it.
        limit_bytes: of the folder, which all pipelines share.
    """

    folder: Path
    limit_bytes: int
    lm: LM
    stages: Mapping[str, Stage]
    run: Run
    before: int

    @contextlib.contextmanager
    def longest(self) -> Iterator[LM | None]:
        """The artifact of the most first stages from which the rest can go on, locked meanwhile."""
        for count in range(len(self.stages), 0, -1):
            entry = self.folder / self.key(count)
            with _locked(entry, fcntl.LOCK_SH) as there:
                if there and (begun := self._continued(entry, count)) is not None:
                    os.utime(entry)  # recently used
                    yield begun
                    return
        yield None

    def _continued(self, entry: Path, count: int) -> LM | None:
        """The artifact, if the stages after `count` do not change weights that are quantized; its records are marked.

        An artifact that somebody has changed shares its files with the entry, which is then of no use.
        """
        rest = list(self.stages.values())[count:]
        held = manifest.read(entry)
        if held.get("files") != manifest.hashes(entry):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        dense = held.pop("dense")
        if rest and rest[0].slot < Slot.CACHE and not dense:
            return None
        records = [dict(record, reused=True) for record in held["stages"][self.before :]]
        held = {**held, "stages": [*held["stages"][: self.before], *records]}
        return LM(entry, manifest=held, loading=self.lm.loading, name=self.lm.name)

    def keep(self, made: LM) -> None:
        """Keeps what the stages so far have made, in memory or as an artifact, if that is worth its bytes."""
        from winnow.model.save import save

        records = made.manifest["stages"][self.before :]
        entry = self.folder / self.key(len(records))
        seconds = sum(record["seconds"] for record in records if not record.get("reused"))
        on_disk = made.path is not None and not made.final
        dense = not made.final and is_dense(made)
        size = _size(Path(str(made.path))) if on_disk else sum(p.nbytes for p in made.model.parameters())
        if entry.is_dir() or size > self.limit_bytes or seconds < size / DISK_BYTES_PER_SECOND:
            return
        if not (on_disk or dense):
            return  # saving would pack the weights that the next stage wants
        self._make_room(size)
        partial = self.folder / f".{entry.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            if on_disk:
                shutil.copytree(str(made.path), partial, copy_function=_link)
            else:
                save(made, partial)
            manifest.write(partial, {**made.manifest, **manifest.read(partial), "dense": dense})
            partial.rename(entry)
        except (
            OSError,
            UserError,
        ):  # another process was faster, or the disk is full: the pipeline goes on all the same
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Removes the least recently used entries that nobody reads, until `size` more bytes are within the limit."""
        used = {path: path.stat().st_mtime for path in _entries(self.folder)}
        sizes = {path: _size(path) for path in used}
        total = sum(sizes.values())
        for path in sorted(used, key=lambda p: used[p]):
            if total + size <= self.limit_bytes:
                return
            with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
                    total -= sizes[path]

    def key(self, count: int) -> str:
        """Of the first `count` stages: SHA-256 over all that decides what they make."""
        applied = list(self.stages.items())[:count]
        run = self.run
        said = {
            "base": [self.lm.sha256(), self.lm.loading.dtype, self.lm.loading.attention],
            "stages": [[name, type(stage).__qualname__, dataclasses.asdict(stage)] for name, stage in applied],  # type: ignore[call-overload]
            "models": [_content(value) for _, stage in applied for value in vars(stage).values()],
            "calibration": [dataclasses.asdict(run.calibration), corpus.content(run.calibration)],
            "run": [run.seed, run.device, run.compute_dtype, run.devices, run.parallel],
            "versions": manifest.versions(),
            "code": code_sha256("method", "training", "data", "model", "nano"),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of(lm: LM, stages: Mapping[str, Stage], run: Run) -> Prefixes:
    """What is kept of `stages` on `lm`; nothing where the run has no place that outlives it, or nobody knows the model."""
    limit = run.stage_cache_bytes if lm.sha256() is not None and run.cache is not None else 0
    before = len(lm.manifest.get("stages", []))
    return Prefixes((run.cache or run.folder) / FOLDER, limit, lm, stages, run, before)


def linked(made: LM, output: Path) -> LM:
    """The same artifact at `output`, its files under a second name where the disk allows that."""
    from winnow.core.files import whole_folder

    with whole_folder(output) as folder:
        shutil.copytree(str(made.path), folder, dirs_exist_ok=True, copy_function=_link)
        manifest.write(folder, made.manifest)
    return LM(output, manifest=manifest.read(output), loading=made.loading, name=made.name)


def is_dense(lm: LM) -> bool:
    """Whether stages can go on working on the weights: they are plain numbers, without an adapter."""
    from winnow.model import packing
    from winnow.model.folder_checks import gguf_file

    if lm.path is not None:
        quantized = getattr(lm.config(), "quantization_config", None) is not None
        return not quantized and gguf_file(Path(lm.path)) is None and adapter.folder_of(lm.path) is None
    quantized = getattr(lm.model.config, "quantization_config", None) is not None
    return not (quantized or adapter.is_adapted(lm.model) or packing.is_packable(lm.model))


@functools.cache
def code_sha256(*folders: str) -> str:
    """Of winnow's own modules in these folders of the package."""
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
    """Another name of a file, or a copy where its disk is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _content(value: Any) -> str | None:
    """What a path stands for: a teacher, or calibration data, may change under the same name."""
    if not isinstance(value, str) or not value:
        return None
    path = Path(value)
    if path.is_dir() and (path / "config.json").is_file():
        return manifest.content_hash(path)
    if path.is_file():
        return sha256(path)
    return None


def _entries(folder: Path) -> Sequence[Path]:
    return [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def _locked(entry: Path, kind: int) -> Iterator[bool]:
    """Whether the entry is there and was locked; the kernel lets go when its process dies."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, kind)
            held = (entry / manifest.NAME).is_file()  # not removed while we waited
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
