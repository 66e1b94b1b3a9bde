"""What is known of a strategy before it runs: bytes and memory from its configuration, refusals, and its likely cost.

The configuration is read in a process of its own that has the libraries for it, so that the search's own stays small and quick.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow.core.errors import UserError
from winnow.core.targets import target_of
from winnow.core.types import Strategy, Trial
from winnow.search import child
from winnow.study.costs import Costs
from winnow.study.policy import Forecaster

# a size from shapes may be off by this much, a memory by that: relative; a constraint is broken beyond it
KNOWN_TO, ESTIMATED_TO = 0.03, 0.25
MOST_KEPT = 50_000  # forecasts


class Forecasts:
    """Of a search; one that cannot be made (the process has died) is empty and refuses nothing.

    Args:
        ask: many strategies at once -> for each `figures` that are known, `estimates`, and a `infeasible_reason`.
        constraints: limits by figure; those that follow from the configuration are checked here.
        cached: whether stages that trials have in common are made once.
    """

    def __init__(
        self,
        ask: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
        constraints: Mapping[str, float] | None = None,
        cached: bool = True,
    ) -> None:
        self._ask, self._constraints = ask, dict(constraints or {})
        self._found: dict[tuple[str, ...], dict[str, Any]] = {}
        self.costs = Costs(cached)

    def observe(self, trial: Trial) -> None:
        self.costs.observe(trial)

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        return [found.get("figures", {}) for found in self._of(strategies)]

    def infeasible_reason(self, strategy: Strategy) -> str:
        (found,) = self._of([strategy])
        if found.get("refusal"):
            return str(found["refusal"])
        for kind, off in (("figures", KNOWN_TO), ("estimates", ESTIMATED_TO)):
            for name, value in found.get(kind, {}).items():
                limit = self._constraints.get(name)
                if limit is not None and value * (1 - off) > limit:
                    return f"{name} would be about {value:.4g}, over constraints.{name}={limit:g}"
        return ""

    def seconds(self, strategy: Strategy) -> float:
        return self.costs.seconds(strategy)

    def _of(self, strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
        """What was found of each; all that were not asked for yet are asked for at once."""
        if len(self._found) + len(strategies) > MOST_KEPT:
            self._found.clear()
        new = {s.overrides: s for s in strategies if s.overrides not in self._found}
        if new:
            found = self._ask([{"methods": list(s.methods), "knobs": dict(s.knobs)} for s in new.values()])
            self._found.update(zip(new, found, strict=True))
        return [self._found[s.overrides] for s in strategies]


def smallest(strategies: Sequence[Strategy], outlook: Forecaster, most: int) -> list[Strategy]:
    """So many of the strategies that can be made, by the size that they are known to have; those of unknown size come last."""
    found = [s for s in strategies if not outlook.infeasible_reason(s)]
    sizes = [figures.get("size_bytes", math.inf) for figures in outlook.figures(found)]
    return [found[place] for place in sorted(range(len(found)), key=sizes.__getitem__)[:most]]


def forecasts(cfg: DictConfig, folder: Path, constraints: Mapping[str, float]) -> Forecasts:
    """Those of the search that `cfg` describes."""
    settings = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]), resolve=True)
    arguments = {"settings": settings, "without": child.left_out()}
    service = child.Service("winnow.search.forecaster:forecaster", arguments, folder / "log.txt")

    def ask(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return service.ask(strategies)  # type: ignore[no-any-return]
        except child.Failed:
            return [{} for _ in strategies]

    return Forecasts(ask, constraints, cached=bool(cfg.stage_cache_gb))


def forecaster(
    settings: dict[str, Any], without: Sequence[str] = ()
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """In the child: what answers; it imports what stages need `without` the modules that start CUDA."""
    from winnow import build
    from winnow.method.knobs import Stage
    from winnow.method.pipeline import check_order
    from winnow.report.dry_run import base_of

    cfg = OmegaConf.create(settings)
    base = base_of(cfg)
    # a strategy holds all that is not a method's default
    plain: dict[str, Any] = {name: target_of(node["_target_"])() for name, node in build.methods(cfg).items()}
    # this process lives beside the trials: CUDA, once started here, would take memory of each GPU
    machine = base.machine(list(plain.values()), without)

    @functools.lru_cache(maxsize=10_000)
    def stage(name: str, knobs: str) -> Stage:
        # Hydra would take longer to make it than all the rest; what a stage refuses, it refuses here, too
        made: Stage = dataclasses.replace(plain[name], **json.loads(knobs))
        return made

    def answer(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one(s["methods"], s["knobs"]) for s in strategies]

    def one(methods: list[str], knobs: dict[str, Any]) -> dict[str, Any]:
        try:
            stages = {}
            for name in methods:
                own = f"method.{name}."
                mine = {k.removeprefix(own): v for k, v in sorted(knobs.items()) if k.startswith(own)}
                stages[name] = stage(name, json.dumps(mine))
            check_order(stages)
            found = base.feasibility(stages, machine)
        except UserError as error:
            return {"refusal": str(error), "figures": {}}
        return {
            "refusal": found.reason,
            "figures": {"size_bytes": float(found.last.disk_bytes)},
            "estimates": {"peak_memory_bytes": float(found.last.serving_bytes)},
        }

    return answer
