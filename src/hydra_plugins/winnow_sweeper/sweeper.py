"""Defines `hydra/sweeper: winnow`, a thin wrapper around `winnow.search`.

Hydra imports this module at every start, so it imports nothing heavy at the top.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="winnow",
    node={"_target_": "hydra_plugins.winnow_sweeper.sweeper.WinnowSweeper"},
    provider="winnow",
)


class WinnowSweeper(Sweeper):
    """Runs a search, which proposes strategies one at a time and launches each through Hydra's launcher."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function

    def sweep(self, arguments: list[str]) -> Any:
        from winnow.search.launching import Launching
        from winnow.search.start import search

        return search(self.config, arguments, Launching(self.hydra_context, self.task_function, self.config))
