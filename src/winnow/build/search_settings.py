"""Reads the configuration of `search.py` into frozen values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from winnow import build
from winnow.agent.recipe import read_recipe
from winnow.benchmark.protocol import Benchmark
from winnow.build.command_settings import DryRun
from winnow.build.job_settings import Racing, TrialLimits, composed_values
from winnow.core.errors import UserError, check_seed
from winnow.core.scalars import check_scalars
from winnow.core.types import Calibration, Objective, Slot, Strategy
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.study.budget import Budget, Convergence
from winnow.study.objectives import constraints, objectives
from winnow.study.policy import Policy
from winnow.study.space import Space, read_space

KEEP = ("front", "all", "none")
T = TypeVar("T")


@dataclass(frozen=True)
class PlainSettings:
    """The settings of a search that are plain values; the comments of `conf/search.yaml` explain them."""

    workers: int
    first_trials: int
    convergence: int | None
    confirm: float
    stage_cache_gb: float
    keep: str
    study: str
    seed: int
    interactive: bool
    dry_run: bool

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.keep not in KEEP:
            raise UserError(f"keep={self.keep} is not known; it is one of {', '.join(KEEP)}")
        if self.workers < 1:
            raise UserError(f"workers={self.workers} leaves nobody to run a trial; give at least 1")
        for name in ("first_trials", "stage_cache_gb"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is negative; give 0 to do without")


@dataclass(frozen=True)
class SearchSettings:
    """All settings of a search, and the objects that they describe.

    Attributes:
        lm: the base model.
        model_moved: whether the base model lies in another folder than `model.path` says, e.g. as a dequantized GGUF file.
        first: strategies of which the `first_trials` smallest run before the policy is asked.
        policy: proposes strategies; None in a dry run.
        storage: URL of the study's storage; None is a file in the study's folder.
        methods: the settings of each method of the space, by name.
        composed: the whole configuration as plain values, of which jobs build their objects in child processes.
        chosen: the option that is chosen in each config group.
        preloads: modules that the fork server imports for the jobs.
    """

    plain: PlainSettings
    lm: LM
    model_moved: bool
    hardware: Hardware
    benchmark: Benchmark
    calibration: Calibration
    space: Space
    first: Sequence[Strategy]
    policy: Policy | None
    budget: Budget
    convergence: Convergence
    objectives: Sequence[Objective]
    constraints: Mapping[str, float]
    outputs: Path
    storage: str | None
    wandb: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    composed: Mapping[str, Any]
    chosen: Mapping[str, str]
    preloads: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return self.outputs / self.plain.study

    def dry_run(self) -> DryRun:
        """Returns what a dry run of the search forecasts, without the stages."""
        return DryRun(self.lm, {}, self.hardware, self.calibration, self.plain.seed)

    def default(self, key: str) -> Any:
        """Returns the configured value of a method's knob by its full key; see `default_of`."""
        return default_of(self.composed)(key)


def search_settings(cfg: DictConfig, narrowed: Mapping[str, Any]) -> SearchSettings:
    """Reads the configuration of a search; builds and checks everything that it describes, and writes nothing.

    Args:
        cfg: the composed configuration; `method` holds the methods of the space.
        narrowed: settings of methods by key, as the command line has them: a fixed value, or a `Knob` of the values to search over.

    Raises:
        UserError: a setting is not valid, or something that it needs is missing.
    """
    methods, composed = build.methods(cfg), composed_values(cfg)
    default = default_of(composed)
    space = read_space(methods, narrowed)
    calibration = build.calibration(cfg)
    plain_settings = _check_settings(cfg)
    _check_fixed(methods, space, default)
    has_recipe = cfg.recipe is not None
    first = [] if has_recipe else first_strategies(space, cfg.first_slots, default)
    budget = _checked(Budget, cfg.budget, "budget")
    convergence = Convergence(None if has_recipe else cfg.convergence)
    lm, hardware, benchmark = build.model(cfg, not cfg.dry_run), build.hardware(cfg), build.benchmark(cfg)
    path = cfg.model.get("path")
    model_moved = bool(lm.path and path and Path(lm.path) != Path(path))
    if model_moved:
        composed["model"] |= {"path": lm.path, "name": lm.name}
    scores = benchmark.scores()
    if cfg.confirm and not scores:
        raise UserError("confirm: this benchmark has no scores to confirm; set confirm=0")
    return SearchSettings(
        plain=plain_settings,
        lm=lm,
        model_moved=model_moved,
        hardware=hardware,
        benchmark=benchmark,
        calibration=calibration,
        space=space,
        first=first,
        objectives=objectives(list(cfg.objectives), scores),
        constraints=constraints(build.plain(cfg.constraints), scores),
        policy=None if cfg.dry_run else _policy(cfg, space, default),
        budget=budget,
        convergence=convergence,
        outputs=Path(cfg.outputs),
        storage=cfg.storage and str(cfg.storage),
        wandb=build.plain(cfg.wandb),
        methods=methods,
        composed=composed,
        chosen=dict(cfg.hydra.runtime.choices),
        preloads=build.preloads(cfg),
    )


def default_of(composed: Mapping[str, Any]) -> Callable[[str], Any]:
    """Returns a function that returns the configured value of a full key, None for a key that there is not."""

    def default(key: str) -> Any:
        node: Any = composed
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    return default


def first_strategies(space: Space, slot_names: Iterable[Any], default: Callable[[str], Any]) -> list[Strategy]:
    """Returns each method of the named slots alone, at its defaults; a search tries some of them before the policy.

    Raises:
        UserError: there is no such slot.
    """
    slots = set()
    for name in slot_names:
        if str(name).upper() not in Slot.__members__:
            known = ", ".join(slot.name.lower() for slot in Slot)
            raise UserError(f"first_slots=[{name}]: there is no such slot; they are {known}")
        slots.add(Slot[str(name).upper()])
    return [Strategy((m.name,), m.defaults(default)) for m in space.methods if m.slot in slots]


def _check_settings(cfg: DictConfig) -> PlainSettings:
    """Returns the plain settings; raises UserError for a setting that a trial would refuse or that has no meaning."""
    if re.search(r"[\x00-\x1f]|\$\{|(^|/)\.{1,2}(/|$)", str(cfg.study)):
        raise UserError(f"study={cfg.study} is no name of a folder; give one without line breaks, dots alone, and ${{")
    settings = _checked(PlainSettings, {field.name: cfg[field.name] for field in dataclasses.fields(PlainSettings)})
    _checked(TrialLimits, cfg.limits, "limits")
    _checked(Racing, cfg.racing, "racing")
    return settings


def _check_fixed(methods: Mapping[str, Mapping[str, Any]], space: Space, default: Callable[[str], Any]) -> None:
    """Raises UserError for a fixed setting of a method that all its trials would refuse."""
    for method in (method for method in space.methods if method.fixed):
        prefix = f"method.{method.name}."
        knobs = method.defaults(default)
        settings = {key.removeprefix(prefix): value for key, value in knobs.items()}
        build.instantiate({"_target_": methods[method.name]["_target_"], **settings}, prefix.strip("."))


def _checked(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a dataclass from settings after checking their types."""
    check_scalars(kind, values, where)
    return kind(**values)


def _policy(cfg: DictConfig, space: Space, default: Callable[[str], Any]) -> Policy:
    """Builds the policy; raises UserError if an API key or a terminal that it needs is missing."""
    if cfg.recipe is not None:
        return read_recipe(build.plain(cfg.recipe), space, default)
    policy = build.policy(cfg)
    if not cfg.interactive:
        return policy
    from winnow.agent.interactive import Interactive, check_terminal

    check_terminal()
    return Interactive(policy, default)
