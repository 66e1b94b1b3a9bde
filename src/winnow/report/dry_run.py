"""What a pipeline or a search would take and make, as a table: from configurations alone, nothing read or written beside them.

python compress.py method=[wanda,rtn] dry_run=true
python search.py hardware=rtx4090 model=local model.path=FOLDER dry_run=true    (a folder with config.json is enough)
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from winnow import build
from winnow.core.errors import UserError
from winnow.core.formats import MISSING, digits, duration, human, plain, scale
from winnow.core.targets import target_of
from winnow.core.types import Calibration, Strategy
from winnow.hardware.run import Run
from winnow.method.knobs import Stage, knobs_of
from winnow.model.lm import LM
from winnow.report.table import aligned

if TYPE_CHECKING:
    from winnow.estimate.cost import Counted
    from winnow.estimate.feasibility import Feasibility, Step
    from winnow.estimate.layout import ModelLayout
    from winnow.estimate.machine import Machine
    from winnow.hardware.device import Hardware
    from winnow.study.budget import Budget
    from winnow.study.space import Method, Space

SIZES = ("on disk", "weights", "KV cache", "served", "main memory", "GPU memory")
_ENDS = 2  # values of a range that the table shows


@dataclass(frozen=True)
class Base:
    """What every row of a table has in common."""

    plan: ModelLayout
    hardware: Hardware
    calibration: Calibration
    name: str

    def feasibility(self, stages: Mapping[str, Stage], machine: Machine) -> Feasibility:
        from winnow.estimate.feasibility import feasibility
        from winnow.method import suitability

        suitability.check(stages, self.plan.tensors, self.plan.spec.name)
        return feasibility(self.plan, stages, self.hardware, self.calibration, machine)

    def machine(self, stages: Sequence[Stage], without: Collection[str] = ()) -> Machine:
        """This machine, once everything that the stages import is in this process, `without` some modules."""
        from winnow.estimate.machine import measured

        for stage in stages:
            stage.work(self.plan, self.calibration)  # counts calibration texts, which takes libraries of its own
        wanted = [name for stage in stages for name in getattr(stage, "preload", ()) if name not in without]
        return measured(self.hardware, self.plan.compute_dtype, wanted)


def base_of(cfg: DictConfig, stages: Mapping[str, Stage] | None = None) -> Base:
    """The base model of `cfg`, by its configuration.

    Raises:
        UserError: there is none, or it is not one that could be compressed.
    """
    from winnow.data.corpus import check_source
    from winnow.estimate.layout import layout_of
    from winnow.method.pipeline import check_dense

    hardware, lm = build.hardware(cfg), build.model(cfg, weights=False)
    hardware = dataclasses.replace(hardware, memory_limit_bytes=hardware.memory_bytes() or None)  # looked up once
    calibration = build.calibration(cfg)
    check_source(calibration)
    computed_in = hardware.compute_dtype if lm.loading.dtype == "auto" else lm.loading.dtype
    plan = dataclasses.replace(layout_of(lm), computed_in=computed_in)
    check_dense(lm, plan.config, stages)
    return Base(plan, hardware, countable(lm, calibration, cfg.seed), lm.name)


def countable(lm: LM, calibration: Calibration, seed: int) -> Calibration:
    """The calibration, its texts tokenised when a stage asks for that.

    Texts from elsewhere than this machine, and those of a model without a tokenizer, count as long as they may be.
    """
    from winnow.estimate.cost import Countable, Counted, counted

    @functools.cache
    def count() -> Counted:
        from winnow.data.calibration import calibration_batches

        if calibration.source != "nano" and not Path(calibration.source).is_file():
            return counted(calibration)
        try:
            _ = lm.tokenizer
        except UserError:
            return counted(calibration)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), seed=seed, log=lambda line: None, calibration=calibration)
            batches, _ = calibration_batches(lm, run)
        sizes = [batch.numel() for batch in batches]
        shapes = len({tuple(batch.shape) for batch in batches})
        return Counted(**vars(calibration), tokens=sum(sizes), shapes=shapes, batch_tokens=max(sizes))

    return Countable(**vars(calibration), count=count)


def forecast(cfg: DictConfig) -> tuple[Base, Feasibility, list[str]]:
    """The pipeline of `cfg`: its base, what becomes of it, and a name for each step.

    Raises:
        UserError: whatever `compress.py` would refuse before it reads weights.
    """
    stages = build.stages(cfg)
    base = base_of(cfg, stages)
    found = base.feasibility(stages, base.machine(list(stages.values())))
    return base, found, ["base", *(_named(name, stage) for name, stage in stages.items())]


def compress_table(cfg: DictConfig) -> str:
    """The base and the model after each stage of `cfg.method`."""
    base, found, names = forecast(cfg)
    rows = [Row(name, step, step.seconds, step.reason) for name, step in zip(names, found.steps, strict=True)]
    peaks = [f"{human('size_bytes', found.host_peak_bytes)} of main memory"]
    if found.device_peak_bytes:
        peaks.append(f"{human('size_bytes', found.device_peak_bytes)} on the GPU")
    end = f"to make it: {' and '.join(peaks)} at the peak, roughly {duration(found.seconds)} once started; "
    verdict = "it fits" if found.fits else f"it does not fit: {found.reason}"
    return "\n".join([_title(base), "", *_table(rows, base.hardware), "", *_reasons(rows), end + verdict])


def search_table(cfg: DictConfig, space: Space, budget: Budget) -> str:
    """The base, and each method of the space by itself: at its defaults, and at the ends of its main knob.

    Raises:
        UserError: whatever `search.py` would refuse before it reads weights.
    """
    base = base_of(cfg)
    tried: list[tuple[Strategy, Stage | None, str]] = []
    for method in sorted(space.methods, key=lambda m: m.slot):
        for strategy in variants(method, cfg):
            try:
                tried.append((strategy, _stage(cfg, method.name, strategy), ""))
            except UserError as error:
                tried.append((strategy, None, str(error)))
    machine = base.machine([stage for _, stage, _ in tried if stage is not None])
    rows = [Row("base", (step := base.feasibility({}, machine).last), step.seconds, step.reason)]
    for strategy, stage, refused in tried:
        if stage is None:
            rows.append(Row(str(strategy), None, None, refused))
            continue
        try:
            found = base.feasibility({strategy.methods[0]: stage}, machine)
        except UserError as error:
            rows.append(Row(str(strategy), None, None, str(error)))
        else:
            # what it takes to make includes loading the base
            whole = dataclasses.replace(
                found.last, host_peak_bytes=found.host_peak_bytes, device_peak_bytes=found.device_peak_bytes
            )
            rows.append(Row(str(strategy), whole, found.seconds, found.reason))
    fit = sum(row.fits for row in rows[1:])
    count = f"{fit} of the {len(rows) - 1} shown fit; {size_of(space)}; {_spending(budget)}"
    return "\n".join([_title(base), "", *_table(rows, base.hardware), "", *_reasons(rows), count])


def variants(method: Method, cfg: DictConfig) -> list[Strategy]:
    """The method at its defaults, at each choice (or both ends) of its main knob, and where it compresses most."""
    every = {d.key: d.nearest(OmegaConf.select(cfg, d.key)) for d in method.dimensions}
    changes: list[dict[str, Any]] = [{}]
    for main in method.dimensions[:1]:
        changes += [{main.key: value} for value in main.grid(_ENDS)]
    most = target_of(cfg.method[method.name]["_target_"]).aggressive
    prefix = f"method.{method.name}."
    allowed = {d.key: d for d in method.dimensions}
    changes.append({prefix + k: v for k, v in most.items() if prefix + k in allowed and allowed[prefix + k].holds(v)})
    found = [Strategy((method.name,), method.knobs({**every, **change})) for change in changes]
    return list({s.overrides: s for s in found}.values())


def size_of(space: Space) -> str:
    """`1,234 strategies`, or how many knobs there are where some are ranges."""
    dimensions = [d for method in space.methods for d in method.dimensions]
    ranges = [d for d in dimensions if not d.choices]
    slots = ", ".join(f"{slot.name.lower()}: {' or '.join(m.name for m in group)}" for slot, group in space.slots())
    if ranges:
        return f"{len(dimensions)} knobs, {len(ranges)} of them ranges ({slots})"
    return f"{sum(1 for _ in space.all(_ENDS)):,} strategies ({slots})"


@dataclass(frozen=True)
class Row:
    """A line of the table; `step` is None for a strategy that cannot be applied at all."""

    name: str
    step: Step | None
    seconds: float | None
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def sizes(self) -> list[float]:
        s = self.step
        if s is None:
            return []
        return [
            s.disk_bytes,
            s.weights_bytes,
            s.cache_bytes,
            s.serving_bytes,
            s.host_peak_bytes,
            s.device_peak_bytes,
        ]


def _table(rows: Sequence[Row], hardware: Hardware) -> list[str]:
    shown = SIZES if hardware.device == "cuda" else SIZES[:-1]
    units = [scale("B", [row.sizes[i] for row in rows if row.sizes]) for i in range(len(shown))]
    cells = [["strategy", *(f"{n} ({u})" for n, (_, u) in zip(shown, units, strict=True)), "time", "fits"]]
    for row in rows:
        sizes = [digits(size / factor) for size, (factor, _) in zip(row.sizes, units, strict=False)]
        sizes = sizes or [MISSING] * len(shown)
        cells.append([plain(row.name), *sizes, duration(row.seconds), "yes" if row.fits else "no"])
    return aligned(cells, ["<", *(">" for _ in shown), ">", "<"])


def _reasons(rows: Sequence[Row]) -> list[str]:
    """A line for each reason, with the methods that it holds for; in full where there is only one strategy."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            names.setdefault(plain(row.reason), []).append(plain(row.name))
    lines = []
    for reason, found in names.items():
        shown = found if len(found) == 1 else list(dict.fromkeys(name.partition("(")[0] for name in found))
        lines.append(f"{', '.join(shown)}: {reason}")
    return [*lines, ""] if lines else []


def _title(base: Base) -> str:
    h = base.hardware
    number = f"{h.devices} x " if h.devices > 1 else ""
    return (
        f"{base.name} on {number}{h.name}, {human('size_bytes', h.memory_bytes())} of memory"
        f"{' each' if h.devices > 1 else ''}; served by {h.runtime}: {h.latency_batch_size} x "
        f"{h.prompt_tokens + h.output_tokens:,} tokens\n"
        "from configurations alone: sizes on disk to 3 %, memory to some 20 %, times are rough"
    )


def _named(name: str, stage: Stage) -> str:
    """The stage with the knobs that a search would vary, and that count beside its others."""
    knobs = {k: knob for k, knob in knobs_of(stage).items() if knob.search}
    active = [k for k, knob in knobs.items() if all(getattr(stage, other) == v for other, v in knob.when.items())]
    return str(Strategy((name,), {f"method.{name}.{k}": getattr(stage, k) for k in active}))


def _spending(budget: Budget) -> str:
    parts = [f"{budget.trials:,} trials"] if budget.trials is not None else []
    parts += [f"{budget.hours:g} h"] if budget.hours is not None else []
    return f"budget {' or '.join(parts)}"


def _stage(cfg: DictConfig, name: str, strategy: Strategy) -> Stage:
    prefix = f"method.{name}."
    knobs = {key.removeprefix(prefix): value for key, value in strategy.knobs.items()}
    stage: Stage = build.instantiate(OmegaConf.merge(cfg.method[name], knobs), f"method.{name}")  # type: ignore[arg-type]
    return stage
