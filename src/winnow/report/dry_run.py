"""Formats as a table what a pipeline or a search would need and produce, from configurations alone.

No weights are read, and nothing is written.

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

from winnow import build
from winnow.build.command_settings import DryRun
from winnow.build.search_settings import SearchSettings
from winnow.core.errors import UserError
from winnow.core.formats import MISSING, digits, duration, human, plain, scale
from winnow.core.targets import target_of
from winnow.core.types import Calibration, Strategy
from winnow.hardware.run import Run
from winnow.method.knobs import Stage, knobs_of
from winnow.model.lm import LM
from winnow.report.table import aligned

if TYPE_CHECKING:
    from winnow.estimate.cost import CountedCalibration
    from winnow.estimate.feasibility import Feasibility, Step
    from winnow.estimate.layout import ModelLayout
    from winnow.estimate.machine import Machine
    from winnow.hardware.device import Hardware
    from winnow.study.budget import Budget
    from winnow.study.space import Method, Space

SIZES = ("on disk", "weights", "KV cache", "served", "main memory", "GPU memory")
_GRID_POINTS = 2  # values of a range in the table: its two ends


@dataclass(frozen=True)
class DryRunBase:
    """What all rows of a table share: the base model, the hardware and the calibration."""

    plan: ModelLayout
    hardware: Hardware
    calibration: Calibration
    name: str

    def feasibility(self, stages: Mapping[str, Stage], machine: Machine) -> Feasibility:
        """Checks that the stages suit the model; returns what each step of the pipeline needs."""
        from winnow.estimate.feasibility import feasibility
        from winnow.method import suitability

        suitability.check(stages, self.plan.tensors, self.plan.spec.name)
        return feasibility(self.plan, stages, self.hardware, self.calibration, machine)

    def machine(self, stages: Sequence[Stage], without: Collection[str] = ()) -> Machine:
        """Measures this machine after importing all modules that the stages need, `without` some modules."""
        from winnow.estimate.machine import measure_machine

        for stage in stages:
            stage.work(self.plan, self.calibration)  # counts calibration texts, which imports further libraries
        modules = [name for stage in stages for name in getattr(stage, "preload", ()) if name not in without]
        return measure_machine(self.hardware, self.plan.compute_dtype, modules)


def load_base(settings: DryRun) -> DryRunBase:
    """Returns the base model, from its configuration alone.

    Raises:
        UserError: the model does not exist or cannot be compressed.
    """
    from winnow.estimate.layout import layout_of
    from winnow.method.pipeline import check_dense

    hardware, lm = settings.hardware, settings.lm
    hardware = dataclasses.replace(hardware, memory_limit_bytes=hardware.memory_bytes() or None)  # looked up once
    compute_dtype = hardware.compute_dtype if lm.loading.dtype == "auto" else lm.loading.dtype
    plan = dataclasses.replace(layout_of(lm), computed_in=compute_dtype)
    check_dense(lm, plan.config, settings.stages)
    return DryRunBase(plan, hardware, countable(lm, settings.calibration, settings.seed), lm.name)


def countable(lm: LM, calibration: Calibration, seed: int) -> Calibration:
    """Returns the calibration with lazy token counts: texts are tokenized when a stage asks for counts.

    Texts that are not on this machine, and texts of a model without a tokenizer, count with their maximum length.
    """
    from winnow.estimate.cost import CountableCalibration, CountedCalibration, count_tokens

    @functools.cache
    def count() -> CountedCalibration:
        from winnow.data.calibration import calibration_batches

        if calibration.source != "nano" and not Path(calibration.source).is_file():
            return count_tokens(calibration)
        try:
            _ = lm.tokenizer
        except UserError:
            return count_tokens(calibration)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), seed=seed, calibration=calibration)
            batches, _ = calibration_batches(lm, run)
        sizes = [batch.numel() for batch in batches]
        shapes = len({tuple(batch.shape) for batch in batches})
        return CountedCalibration(**vars(calibration), tokens=sum(sizes), shapes=shapes, batch_tokens=max(sizes))

    return CountableCalibration(**vars(calibration), count=count)


def forecast(settings: DryRun) -> tuple[DryRunBase, Feasibility, list[str]]:
    """Returns for a pipeline the base model, the feasibility of each step and the step names.

    Raises:
        UserError: whatever `compress.py` would refuse before it reads weights.
    """
    base, stages = load_base(settings), settings.stages
    feasibility = base.feasibility(stages, base.machine(list(stages.values())))
    return base, feasibility, ["base", *(_strategy_text(name, stage) for name, stage in stages.items())]


def compress_table(settings: DryRun) -> str:
    """Returns a table of the base model and the model after each stage."""
    base, feasibility, names = forecast(settings)
    rows = [Row(name, step, step.seconds, step.reason) for name, step in zip(names, feasibility.steps, strict=True)]
    peaks = [f"{human('size_bytes', feasibility.host_peak_bytes)} of main memory"]
    if feasibility.device_peak_bytes:
        peaks.append(f"{human('size_bytes', feasibility.device_peak_bytes)} on the GPU")
    needs = f"to make it: {' and '.join(peaks)} at the peak, roughly {duration(feasibility.seconds)} once started; "
    verdict = "it fits" if feasibility.fits else f"it does not fit: {feasibility.reason}"
    return "\n".join([_title(base), "", *_table(rows, base.hardware), "", *_reasons(rows), needs + verdict])


def search_table(settings: SearchSettings) -> str:
    """Returns a table of the base model and each method of the space alone: at its defaults and at both ends of its main knob.

    Raises:
        UserError: whatever `search.py` would refuse before it reads weights.
    """
    base = load_base(settings.dry_run())
    space, budget = settings.space, settings.budget
    candidates: list[tuple[Strategy, Stage | None, str]] = []
    for method in sorted(space.methods, key=lambda m: m.slot):
        for strategy in variants(method, settings):
            try:
                candidates.append((strategy, _stage(settings, method.name, strategy), ""))
            except UserError as error:
                candidates.append((strategy, None, str(error)))
    machine = base.machine([stage for _, stage, _ in candidates if stage is not None])
    rows = [Row("base", (step := base.feasibility({}, machine).last), step.seconds, step.reason)]
    for strategy, stage, refusal in candidates:
        if stage is None:
            rows.append(Row(str(strategy), None, None, refusal))
            continue
        try:
            feasibility = base.feasibility({strategy.methods[0]: stage}, machine)
        except UserError as error:
            rows.append(Row(str(strategy), None, None, str(error)))
        else:
            # the peaks of compression include loading the base
            step_from_base = dataclasses.replace(
                feasibility.last,
                host_peak_bytes=feasibility.host_peak_bytes,
                device_peak_bytes=feasibility.device_peak_bytes,
            )
            rows.append(Row(str(strategy), step_from_base, feasibility.seconds, feasibility.reason))
    fit = sum(row.fits for row in rows[1:])
    count = f"{fit} of the {len(rows) - 1} shown fit; {describe_size(space)}; {_budget_text(budget)}"
    return "\n".join([_title(base), "", *_table(rows, base.hardware), "", *_reasons(rows), count])


def variants(method: Method, settings: SearchSettings) -> list[Strategy]:
    """Returns the method at its defaults, at each choice (or both ends) of its main knob, and at its strongest compression."""
    defaults = {d.key: d.nearest(settings.default(d.key)) for d in method.dimensions}
    changes: list[dict[str, Any]] = [{}]
    for main in method.dimensions[:1]:
        changes += [{main.key: value} for value in main.grid(_GRID_POINTS)]
    strongest = target_of(settings.methods[method.name]["_target_"]).aggressive
    prefix = f"method.{method.name}."
    allowed = {d.key: d for d in method.dimensions}
    changes.append(
        {prefix + k: v for k, v in strongest.items() if prefix + k in allowed and allowed[prefix + k].contains(v)}
    )
    strategies = [Strategy((method.name,), method.knobs({**defaults, **change})) for change in changes]
    return list({s.overrides: s for s in strategies}.values())


def describe_size(space: Space) -> str:
    """Returns the size of the space as text: `1,234 strategies`, or the number of knobs if some are ranges."""
    dimensions = [d for method in space.methods for d in method.dimensions]
    ranges = [d for d in dimensions if not d.choices]
    slots = ", ".join(f"{slot.name.lower()}: {' or '.join(m.name for m in group)}" for slot, group in space.slots())
    if ranges:
        return f"{len(dimensions)} knobs, {len(ranges)} of them ranges ({slots})"
    return f"{sum(1 for _ in space.all(_GRID_POINTS)):,} strategies ({slots})"


@dataclass(frozen=True)
class Row:
    """A row of the table; `step` is None for a strategy that cannot be applied."""

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
    size_names = SIZES if hardware.device == "cuda" else SIZES[:-1]
    units = [scale("B", [row.sizes[i] for row in rows if row.sizes]) for i in range(len(size_names))]
    cells = [["strategy", *(f"{n} ({u})" for n, (_, u) in zip(size_names, units, strict=True)), "time", "fits"]]
    for row in rows:
        sizes = [digits(size / factor) for size, (factor, _) in zip(row.sizes, units, strict=False)]
        sizes = sizes or [MISSING] * len(size_names)
        cells.append([plain(row.name), *sizes, duration(row.seconds), "yes" if row.fits else "no"])
    return aligned(cells, ["<", *(">" for _ in size_names), ">", "<"])


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each reason with the methods it applies to; a single strategy is named in full."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            names.setdefault(plain(row.reason), []).append(plain(row.name))
    lines = []
    for reason, row_names in names.items():
        names_shown = (
            row_names if len(row_names) == 1 else list(dict.fromkeys(name.partition("(")[0] for name in row_names))
        )
        lines.append(f"{', '.join(names_shown)}: {reason}")
    return [*lines, ""] if lines else []


def _title(base: DryRunBase) -> str:
    hardware = base.hardware
    number = f"{hardware.devices} x " if hardware.devices > 1 else ""
    return (
        f"{base.name} on {number}{hardware.name}, {human('size_bytes', hardware.memory_bytes())} of memory"
        f"{' each' if hardware.devices > 1 else ''}; served by {hardware.runtime}: {hardware.latency_batch_size} x "
        f"{hardware.prompt_tokens + hardware.output_tokens:,} tokens\n"
        "from configurations alone: sizes on disk to 3 %, memory to some 20 %, times are rough"
    )


def _strategy_text(name: str, stage: Stage) -> str:
    """Returns the stage as text, with those knobs that a search would vary and that are active."""
    knobs = {k: knob for k, knob in knobs_of(stage).items() if knob.search}
    active = [k for k, knob in knobs.items() if all(getattr(stage, other) == v for other, v in knob.when.items())]
    return str(Strategy((name,), {f"method.{name}.{k}": getattr(stage, k) for k in active}))


def _budget_text(budget: Budget) -> str:
    parts = [f"{budget.trials:,} trials"] if budget.trials is not None else []
    parts += [f"{budget.hours:g} h"] if budget.hours is not None else []
    return f"budget {' or '.join(parts)}"


def _stage(settings: SearchSettings, name: str, strategy: Strategy) -> Stage:
    prefix = f"method.{name}."
    knobs = {key.removeprefix(prefix): value for key, value in strategy.knobs.items()}
    stage: Stage = build.instantiate({**settings.methods[name], **knobs}, f"method.{name}")
    return stage
