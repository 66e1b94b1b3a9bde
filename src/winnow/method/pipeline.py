"""A pipeline: stages applied in order, each recorded, and the result saved as one artifact.

The slots of the stages must not go down: prune < recover < quantize < adapt < cache < prompt, at most one of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.types import LM, Run, Stage, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_order(stages: Mapping[str, Stage]) -> None:
    """Refuses pipelines whose stages undo or cannot read one another.

    Raises:
        UserError: two stages of one slot, or a stage before one that must come earlier.
    """
    named = list(stages.items())
    for (first, before), (second, after) in itertools.pairwise(named):
        if before.slot == after.slot:
            raise UserError(
                f"method=[{','.join(stages)}]: {first} and {second} are both {before.slot.name.lower()} methods; "
                f"keep one of them"
            )
        if before.slot > after.slot:
            right = ",".join(sorted(stages, key=lambda name: stages[name].slot))
            raise UserError(
                f"method=[{','.join(stages)}]: {second} ({after.slot.name.lower()}) cannot come after {first} "
                f"({before.slot.name.lower()}), whose weights it would have to change; write method=[{right}]"
            )


def check_dense(lm: LM, config: PretrainedConfig) -> None:
    """Refuses a model that is quantized already, by its configuration.

    Raises:
        UserError: its integers are no weights that a stage could work on.
    """
    if getattr(config, "quantization_config", None) is not None:
        base = lm.manifest.get("base", {}).get("name")
        raise UserError(
            f"model.path={lm.path} is quantized already and cannot be compressed again; "
            f"start from the model that it was made of{f' ({base})' if base else ''}"
        )


def apply(lm: LM, stages: Mapping[str, Stage], run: Run) -> LM:
    """The model after all stages, in memory, with a record of each in its manifest."""
    from winnow.hardware.energy import EnergyMeter

    for name, stage in stages.items():
        run.log(f"{name}: {', '.join(f'{k}={v}' for k, v in dataclasses.asdict(stage).items())}")  # type: ignore[call-overload]
        started = time.perf_counter()
        with EnergyMeter() as energy:
            lm = stage(lm, run)
        record: dict[str, Any] = {
            "method": name,
            "slot": stage.slot.name.lower(),
            "knobs": dataclasses.asdict(stage),  # type: ignore[call-overload]
            "seed": run.seed,
            "seconds": round(time.perf_counter() - started, 3),
            **energy.record(),
            **lm.manifest.pop("_notes", {}),
        }
        lm.manifest = {**lm.manifest, "stages": [*lm.manifest.get("stages", []), record]}
        run.log(f"{name}: done in {record['seconds']:.1f} s")
    return lm


def check_finite(lm: LM) -> None:
    """Raises UserError if a weight is NaN or infinite: every figure of what is made of it would be worthless."""
    for name, parameter in lm.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model.path={lm.path}: {name} holds NaN or infinity; the model is damaged, get it anew")


def compress(lm: LM, stages: Mapping[str, Stage], run: Run, output: Path) -> LM:
    """Applies the stages and writes the artifact to `output`, whole or not at all; returns it as an LM on disk.

    Then it is tried in the runtimes that there are for it; which of them serve it is added to its manifest.

    Raises:
        UserError: the model is quantized already: its integers are no weights that a stage could work on; or it is damaged.
    """
    from winnow.hardware.runtime.check import tried
    from winnow.model import manifest
    from winnow.model.save import save

    check_dense(lm, lm.model.config)
    check_finite(lm)
    if not lm.manifest.get("base", {}).get("sha256"):  # not an artifact of another model: the base itself
        lm.manifest = {"base": {"name": lm.name, "sha256": lm.sha256()}, "stages": []}
    saved = save(apply(lm, stages, run), output)
    lm.release()  # so that there is one model in memory at a time
    saved.manifest["runtimes"] = tried(saved, run.device, run.log)
    manifest.write(output, saved.manifest)
    return saved
