"""A pipeline: stages applied in order, each recorded, and the result saved as one artifact.

The slots of the stages must not go down: prune < recover < quantize < adapt < cache < prompt, at most one of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.types import Slot
from winnow.hardware.run import Run
from winnow.method import prefixes, suitability
from winnow.method.knobs import Stage
from winnow.model import adapter
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
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
        if getattr(before, "ends_pipeline", False):
            raise UserError(
                f"method=[{','.join(stages)}]: {first} writes the file that a runtime loads, and {second} cannot work on it; "
                f"leave one of them out"
            )
    adapters = [name for name, stage in stages.items() if getattr(stage, "leaves_adapter", False)]
    if len(adapters) > 1:
        raise UserError(
            f"method=[{','.join(stages)}]: {' and '.join(adapters)} would each leave an adapter beside the model, and it takes "
            f"one; keep one of them, or set method.{adapters[0]}.merge=true"
        )


def check_dense(lm: LM, config: PretrainedConfig, stages: Mapping[str, Stage] | None = None) -> None:
    """Refuses a model that is quantized or has an adapter already, but for stages that leave its weights as they are.

    Raises:
        UserError: its integers are no weights that a stage could work on, or not without the adapter.
    """
    slots = [stage.slot for stage in (stages or {}).values()]
    adapted = adapter.folder_of(lm.path) is not None
    least = Slot.CACHE if adapted else Slot.ADAPT
    if not is_finished(lm, config) or (slots and min(slots) >= least and not (adapted and max(slots) > Slot.CACHE)):
        return
    base = lm.manifest.get("base", {}).get("name")
    raise UserError(
        f"model.path={lm.path} {'has an adapter' if adapted else 'is quantized'} already and cannot be compressed again; "
        f"start from the model that it was made of{f' ({base})' if base else ''}"
    )


def is_finished(lm: LM, config: PretrainedConfig) -> bool:
    """Whether the weights are to stay as they are: they are quantized, or an adapter was trained for them."""
    return getattr(config, "quantization_config", None) is not None or adapter.folder_of(lm.path) is not None


def copied(lm: LM, folder: Path) -> LM:
    """The files of a finished model in `folder`, for stages that put something beside them: none of them is written anew."""
    import shutil

    from huggingface_hub import snapshot_download

    from winnow.model.folder import ON_THE_HUB, content_files

    assert lm.path is not None
    source = Path(lm.path)
    if not source.is_dir():
        source = Path(snapshot_download(lm.path, allow_patterns=list(ON_THE_HUB)))
    shutil.rmtree(folder, ignore_errors=True)
    for name, file in content_files(source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / name)
    return lm.stored(folder)


def apply(lm: LM, stages: Mapping[str, Stage], run: Run, after: Callable[[LM], None] = lambda made: None) -> LM:
    """The model after all stages, in memory, with a record of each in its manifest; `after` sees it between two of them.

    A record says what the stage took: seconds, `energy_wh` and `co2_g` (at `run.carbon_g_per_kwh`) with their source. That of
    a training has `training` too: its loss and held-out losses, steps, tokens per second. What a training that was cut off
    took before its last resumption is not in it; `resumed_at_step` says where that was.
    """
    from winnow.hardware.energy import EnergyMeter
    from winnow.training import dist_env, torchrun

    for number, (name, stage) in enumerate(stages.items()):
        if number:
            after(lm)
        run.log(f"{name}: {', '.join(f'{k}={v}' for k, v in dataclasses.asdict(stage).items())}")  # type: ignore[call-overload]
        started = time.perf_counter()
        before = _readied(stage, lm)
        with EnergyMeter(run.carbon_g_per_kwh, run.device, run.devices) as energy:
            lm = (
                torchrun.run_under_torchrun(name, stage, lm, run)
                if torchrun.needs_torchrun(stage, run)
                else stage(lm, run)
            )
        record: dict[str, Any] = {
            "method": name,
            "slot": stage.slot.name.lower(),
            "knobs": dataclasses.asdict(stage),  # type: ignore[call-overload]
            "seed": run.seed,
            "computed_in": run.compute_dtype,
            "seconds": round(time.perf_counter() - started, 3),
            **dist_env.together(energy, run).record(),
            **lm.manifest.pop("_notes", {}),
        }
        if before and lm.path is None:  # what is files by now is of another format, or was checked where it was made
            suitability.check_changed(name, before, lm.model)
            record |= _experts_without_tokens(name, lm, run)
        lm.manifest = {**lm.manifest, "stages": [*lm.manifest.get("stages", []), record]}
        run.log(f"{name}: done in {record['seconds']:.1f} s")
    return lm


def _readied(stage: Stage, lm: LM) -> dict[str, torch.Tensor]:
    """Brings the model into the form that a stage works on; some of its weights by name, if the stage has to change them."""
    from winnow.model import unfused

    if stage.slot > Slot.QUANTIZE:
        return {}
    unfused.ready(lm.model, getattr(stage, "matrices", None))
    unfused.count_tokens(lm.model)
    return suitability.sample(lm.model)


def _experts_without_tokens(name: str, lm: LM, run: Run) -> dict[str, Any]:
    """For the record: the experts that the calibration has not reached, which were compressed without regard to inputs."""
    from winnow.model.unfused import unreached

    without = unreached(lm.model)
    if not without:
        return {}
    run.log(
        f"{name}: the calibration sent no token to {len(without)} experts ({', '.join(without[:3])}"
        f"{', ...' if len(without) > 3 else ''}); raise calibration.samples, or take other text with calibration.source"
    )
    return {"experts_without_tokens": without}


def origin(lm: LM) -> dict[str, Any]:
    """Where a base model comes from, as far as is known: the hub, or a GGUF file (its hash, types, what it was turned into)."""
    if lm.path is not None and not Path(lm.path).is_dir():
        return {"origin": {"hub": lm.path}}
    return {name: value for name, value in lm.manifest.items() if name == "origin"}


def check_finite(lm: LM) -> None:
    """Raises UserError if a weight is NaN or infinite: every figure of what is made of it would be worthless."""
    for name, parameter in lm.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model.path={lm.path}: {name} holds NaN or infinity; the model is damaged, get it anew")


def check(stages: Mapping[str, Stage], lm: LM, run: Run) -> None:
    """Refuses, before the first stage begins, what a later one could not work on.

    Raises:
        UserError: a stage does not suit the model that those before it will make.
    """
    from winnow.estimate.layout import ModelLayout, dense_tensors, layout_of

    config = lm.model.config
    if is_finished(lm, config):
        plan = layout_of(lm)
    else:
        plan = ModelLayout(config, dense_tensors(config))
        suitability.check(stages, plan.tensors, type(lm.model).__name__)
    plan = dataclasses.replace(plan, computed_in=run.compute_dtype)
    for stage in stages.values():
        stage.check(plan, lm, run)
        plan = stage.predict(plan)


def compress(lm: LM, stages: Mapping[str, Stage], run: Run, output: Path) -> LM:
    """Applies the stages and writes the artifact to `output`, whole or not at all; returns it as an LM on disk.

    It goes on from what an earlier pipeline that began alike has left, where `run.stage_cache_bytes` allows to keep such
    (`winnow.method.prefixes`). Then it is tried in the runtimes that there are for it; which of them serve it is added to
    its manifest.

    Raises:
        UserError: the model is quantized already, and a stage would change its weights; or it is damaged.
    """
    from winnow.training.dist_env import world

    if not lm.manifest.get("base", {}).get("sha256"):  # not an artifact of another model: the base itself
        lm.manifest = {"base": {"name": lm.name, "sha256": lm.sha256(), **origin(lm)}, "stages": []}
    lm.manifest["calibration"] = dataclasses.asdict(run.calibration)
    run = dataclasses.replace(run, base=run.base or lm.path)
    if not run.stage_cache_bytes or world().size > 1:
        return _made(lm, stages, run, output)
    kept = prefixes.of(lm, stages, run)
    with kept.longest() as begun:
        if begun is None:
            return _made(lm, stages, run, output, kept.keep)
        done = len(begun.manifest["stages"]) - len(lm.manifest["stages"])
        run.log(f"{', '.join(list(stages)[:done])}: made before, in {begun.path}")
        lm.release()
        if done == len(stages):
            return prefixes.linked(begun, output)
        return _made(begun, dict(list(stages.items())[done:]), run, output, kept.keep)


def _made(
    lm: LM, stages: Mapping[str, Stage], run: Run, output: Path, keep: Callable[[LM], None] = lambda made: None
) -> LM:
    """See `compress`; `keep` is shown what lies between two stages, and the artifact."""
    from winnow.model import manifest
    from winnow.model.save import save
    from winnow.runtime.check import working_runtimes
    from winnow.training.dist_env import world

    config = lm.model.config
    check_dense(lm, config, stages)
    check_finite(lm)
    check(stages, lm, run)
    if is_finished(lm, config):
        lm.release()
        lm = copied(lm, run.folder / f"files-{world().rank}")
    made = apply(lm, stages, run, keep)
    if not world().is_rank_zero:
        return made
    saved = save(made, output)
    lm.release()  # so that there is one model in memory at a time
    base = LM(run.base, loading=lm.loading) if run.base is not None else None
    saved.manifest |= working_runtimes(saved, run.device, run.log, base)
    manifest.write(output, saved.manifest)
    keep(saved)
    return saved
