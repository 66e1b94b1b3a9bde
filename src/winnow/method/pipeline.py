"""Runs a pipeline: applies its stages in order, records each, and saves the result as one artifact.

Stages must be in the order of their slots: prune < recover < quantize < adapt < cache < prompt, at most one of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
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

logger = logging.getLogger(__name__)


def check_order(stages: Mapping[str, Stage]) -> None:
    """Refuses pipelines whose stages would undo, or cannot read, one another's result.

    Raises:
        UserError: two stages have the same slot, or a stage comes before one that must precede it.
    """
    items = list(stages.items())
    for (first, before), (second, after) in itertools.pairwise(items):
        if before.slot == after.slot:
            raise UserError(
                f"method=[{','.join(stages)}]: {first} and {second} are both {before.slot.name.lower()} methods; "
                f"keep one of them"
            )
        if before.slot > after.slot:
            ordered = ",".join(sorted(stages, key=lambda name: stages[name].slot))
            raise UserError(
                f"method=[{','.join(stages)}]: {second} ({after.slot.name.lower()}) cannot come after {first} "
                f"({before.slot.name.lower()}), whose weights it would have to change; write method=[{ordered}]"
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
    """Refuses a model that is quantized or has an adapter already, unless all stages leave its weights unchanged.

    Raises:
        UserError: a stage cannot work on its integers, or on its weights without the adapter.
    """
    slots = [stage.slot for stage in (stages or {}).values()]
    adapted = adapter.folder_of(lm.path) is not None
    first_allowed = Slot.CACHE if adapted else Slot.ADAPT
    if not is_finished(lm, config) or (
        slots and min(slots) >= first_allowed and not (adapted and max(slots) > Slot.CACHE)
    ):
        return
    base = lm.manifest.get("base", {}).get("name")
    raise UserError(
        f"model.path={lm.path} {'has an adapter' if adapted else 'is quantized'} already and cannot be compressed again; "
        f"start from the model that it was made of{f' ({base})' if base else ''}"
    )


def is_finished(lm: LM, config: PretrainedConfig) -> bool:
    """Returns whether the weights must stay unchanged: they are quantized, or an adapter was trained for them."""
    return getattr(config, "quantization_config", None) is not None or adapter.folder_of(lm.path) is not None


def copy_files(lm: LM, folder: Path) -> LM:
    """Copies the files of a finished model to `folder`, for stages that add files without changing these."""
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
    return lm.with_files(folder)


def apply(lm: LM, stages: Mapping[str, Stage], run: Run, after_stage: Callable[[LM], None] = lambda lm: None) -> LM:
    """Applies all stages in memory and records each in the manifest; calls `after_stage` with the model between two stages.

    A record has the cost of the stage: seconds, `energy_wh` and `co2_g` (at `run.carbon_g_per_kwh`) with their source. The
    record of a training also has `training`: its loss and held-out losses, steps, tokens per second. The cost of a resumed
    training excludes what came before its last resumption, which was at `resumed_at_step`.
    """
    from winnow.hardware.energy import EnergyMeter
    from winnow.training import dist_env, torchrun

    for number, (name, stage) in enumerate(stages.items()):
        if number:
            after_stage(lm)
        logger.info(f"{name}: {', '.join(f'{k}={v}' for k, v in dataclasses.asdict(stage).items())}")  # type: ignore[call-overload]
        started = time.perf_counter()
        weights_before = _prepare(stage, lm)
        with EnergyMeter(run.carbon_g_per_kwh, run.device, run.devices) as energy:
            lm, notes = (
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
            **dist_env.total_energy(energy, run).record(),
            **notes,
        }
        if weights_before and lm.path is None:  # an LM on disk has another format, or was checked where it was written
            suitability.check_changed(name, weights_before, lm.model)
            record |= _experts_without_tokens(name, lm)
        lm.manifest = {**lm.manifest, "stages": [*lm.manifest.get("stages", []), record]}
        logger.info(f"{name}: done in {record['seconds']:.1f} s")
    return lm


def _prepare(stage: Stage, lm: LM) -> dict[str, torch.Tensor]:
    """Converts the model to the form that a stage works on; returns sampled weights by name if the stage must change them."""
    from winnow.model import unfused

    if stage.slot > Slot.QUANTIZE:
        return {}
    unfused.prepare_for_stage(lm.model, getattr(stage, "matrices", None))
    unfused.reset_token_counts(lm.model)
    return suitability.sample(lm.model)


def _experts_without_tokens(name: str, lm: LM) -> dict[str, Any]:
    """Returns, for the record, the experts that calibration did not reach: they were compressed without regard to inputs."""
    from winnow.model.unfused import unrouted_experts

    unrouted = unrouted_experts(lm.model)
    if not unrouted:
        return {}
    logger.info(
        f"{name}: the calibration sent no token to {len(unrouted)} experts ({', '.join(unrouted[:3])}"
        f"{', ...' if len(unrouted) > 3 else ''}); raise calibration.samples, or take other text with calibration.source"
    )
    return {"experts_without_tokens": unrouted}


def origin(lm: LM) -> dict[str, Any]:
    """Returns the known origin of a base model: the hub, or a GGUF file (its hash, its types, what it was converted to)."""
    if lm.path is not None and not Path(lm.path).is_dir():
        return {"origin": {"hub": lm.path}}
    return {name: value for name, value in lm.manifest.items() if name == "origin"}


def check_finite(lm: LM) -> None:
    """Raises UserError if a weight is NaN or infinite: every metric of its compressed versions would be worthless."""
    for name, parameter in lm.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model.path={lm.path}: {name} holds NaN or infinity; the model is damaged, get it anew")


def check(stages: Mapping[str, Stage], lm: LM, run: Run) -> None:
    """Checks every stage against the model that it will receive, before the first stage begins.

    Raises:
        UserError: a stage does not suit the model that the stages before it will produce.
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
    """Applies the stages and writes the artifact to `output`, completely or not at all; returns it as an LM on disk.

    It continues from the cached result of an earlier pipeline with the same first stages (`winnow.method.prefixes`), if
    `run.stage_cache_bytes` allows a cache. It then tries the artifact in the available runtimes and adds those that serve it
    to the manifest.

    Raises:
        UserError: the model is quantized already, and a stage would change its weights; or it is damaged.
    """
    from winnow.training.dist_env import world

    if not lm.manifest.get("base", {}).get("sha256"):  # the model is a base model, not an artifact
        lm.manifest = {"base": {"name": lm.name, "sha256": lm.sha256(), **origin(lm)}, "stages": []}
    lm.manifest["calibration"] = dataclasses.asdict(run.calibration)
    run = dataclasses.replace(run, base=run.base or lm.path)
    if not run.stage_cache_bytes or world().size > 1:
        return _compress(lm, stages, run, output)
    cache = prefixes.prefix_cache(lm, stages, run)
    with cache.longest_cached() as artifact:
        if artifact is None:
            return _compress(lm, stages, run, output, cache.store)
        done = len(artifact.manifest["stages"]) - len(lm.manifest["stages"])
        logger.info(f"{', '.join(list(stages)[:done])}: made before, in {artifact.path}")
        lm.release()
        if done == len(stages):
            return prefixes.link_artifact(artifact, output)
        return _compress(artifact, dict(list(stages.items())[done:]), run, output, cache.store)


def _compress(
    lm: LM, stages: Mapping[str, Stage], run: Run, output: Path, store: Callable[[LM], None] = lambda lm: None
) -> LM:
    """Runs `compress` without reading the cache; calls `store` with the model between two stages and with the artifact."""
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
        lm = copy_files(lm, run.folder / f"files-{world().rank}")
    result = apply(lm, stages, run, store)
    if not world().is_rank_zero:
        return result
    saved = save(result, output)
    lm.release()  # so that only one model is in memory at a time
    base = LM(run.base, loading=lm.loading) if run.base is not None else None
    saved.manifest |= working_runtimes(saved, run.device, base)
    manifest.write(output, saved.manifest)
    store(saved)
    return saved
