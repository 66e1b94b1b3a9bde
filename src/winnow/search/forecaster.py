"""Forecasts the size, the memory, the feasibility and the cost of a strategy from configurations, before it runs.

A child process reads the configurations, because that needs heavy libraries: the search's own process stays small and quick.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from winnow.build.search_settings import SearchSettings
from winnow.core.cache import BatchCache
from winnow.core.errors import UserError
from winnow.core.types import Strategy, Trial
from winnow.search import child, fork_server
from winnow.study.costs import Costs
from winnow.study.policy import Forecaster

# relative errors of a size from shapes and of a memory estimate; a constraint counts as broken only beyond them
SIZE_TOLERANCE, MEMORY_TOLERANCE = 0.03, 0.25
MAX_CACHED = 50_000  # forecasts in memory


class Forecasts:
    """Forecasts for the strategies of a search; a forecast that fails (the child has died) is empty and refuses nothing.

    Args:
        compute: returns for each of many strategies the known `figures`, the `estimates` and the `refusal`.
        constraints: limits by figure; a limit on a forecast figure is checked here.
        cached: whether stages that several trials share run only once.
    """

    def __init__(
        self,
        compute: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
        constraints: Mapping[str, float] | None = None,
        cached: bool = True,
    ) -> None:
        self._compute, self._constraints = compute, dict(constraints or {})
        self._cache: BatchCache[tuple[str, ...], Strategy, dict[str, Any]] = BatchCache(
            lambda s: s.overrides, MAX_CACHED
        )
        self.costs = Costs(cached)

    def observe(self, trial: Trial) -> None:
        self.costs.observe(trial)

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        return [forecast.get("figures", {}) for forecast in self._forecasts(strategies)]

    def infeasible_reason(self, strategy: Strategy) -> str:
        (forecast,) = self._forecasts([strategy])
        if forecast.get("refusal"):
            return str(forecast["refusal"])
        for kind, tolerance in (("figures", SIZE_TOLERANCE), ("estimates", MEMORY_TOLERANCE)):
            for name, value in forecast.get(kind, {}).items():
                limit = self._constraints.get(name)
                if limit is not None and value * (1 - tolerance) > limit:
                    return f"{name} would be about {value:.4g}, over constraints.{name}={limit:g}"
        return ""

    def seconds(self, strategy: Strategy) -> float:
        return self.costs.seconds(strategy)

    def _forecasts(self, strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
        """Returns the forecast of each strategy; computes all missing ones in one call."""

        def compute(missing: list[Strategy]) -> list[dict[str, Any]]:
            return self._compute([{"methods": list(s.methods), "knobs": dict(s.knobs)} for s in missing])

        return self._cache.values(strategies, compute)


def smallest(strategies: Sequence[Strategy], forecaster: Forecaster, count: int) -> list[Strategy]:
    """Returns the `count` smallest feasible strategies by forecast size; strategies of unknown size come last."""
    feasible = [s for s in strategies if not forecaster.infeasible_reason(s)]
    sizes = [figures.get("size_bytes", math.inf) for figures in forecaster.figures(feasible)]
    return [feasible[place] for place in sorted(range(len(feasible)), key=sizes.__getitem__)[:count]]


def forecasts(settings: SearchSettings) -> Forecasts:
    """Returns the forecasts of a search, computed in a child process."""
    folder = settings.folder
    arguments = {"composed": settings.composed, "without": fork_server.left_out()}
    service = child.Service("winnow.search.forecaster:forecaster", arguments, folder / "log.txt")

    def ask(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return service.ask(strategies)  # type: ignore[no-any-return]
        except child.Failed:
            return [{} for _ in strategies]

    return Forecasts(ask, settings.constraints, cached=bool(settings.plain.stage_cache_gb))


def forecaster(
    composed: dict[str, Any], without: Sequence[str] = ()
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Runs in the child: returns the function that computes forecasts.

    It imports the modules that the stages need, `without` those that start CUDA.
    """
    from winnow.build.job_settings import forecast_settings
    from winnow.method.knobs import Stage
    from winnow.method.pipeline import check_order
    from winnow.report.dry_run import load_base

    settings, stage_classes = forecast_settings(composed)
    base = load_base(settings)
    # a strategy holds every knob that differs from the method's default
    default_stages: dict[str, Any] = {name: stage_class() for name, stage_class in stage_classes.items()}
    # this process runs beside the trials: CUDA, once started here, would take memory on each GPU
    machine = base.machine(list(default_stages.values()), without)

    @functools.lru_cache(maxsize=10_000)
    def stage(name: str, knobs: str) -> Stage:
        # instantiation by Hydra would take longer than all the rest; the stage checks its knobs here, too
        built: Stage = dataclasses.replace(default_stages[name], **json.loads(knobs))
        return built

    def answer(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [forecast_one(s["methods"], s["knobs"]) for s in strategies]

    def forecast_one(methods: list[str], knobs: dict[str, Any]) -> dict[str, Any]:
        try:
            stages = {}
            for name in methods:
                prefix = f"method.{name}."
                stage_knobs = {k.removeprefix(prefix): v for k, v in sorted(knobs.items()) if k.startswith(prefix)}
                stages[name] = stage(name, json.dumps(stage_knobs))
            check_order(stages)
            feasibility = base.feasibility(stages, machine)
        except UserError as error:
            return {"refusal": str(error), "figures": {}}
        return {
            "refusal": feasibility.reason,
            "figures": {"size_bytes": float(feasibility.last.disk_bytes)},
            "estimates": {"peak_memory_bytes": float(feasibility.last.serving_bytes)},
        }

    return answer
