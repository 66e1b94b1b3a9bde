"""Search for the Pareto front of compressed versions of a model. `python search.py --help` lists the options.

`conf/search.yaml` makes this a Hydra multirun with the sweeper of winnow: the sweeper proposes strategies, and this task runs one
strategy in the process that the launcher chose. (Hydra's basic launcher has no process of its own: `winnow.search.launching`.)
"""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from winnow.core.cli import command


@command("search")
def main(cfg: DictConfig) -> dict[str, Any]:
    from pathlib import Path

    from winnow.build.job_settings import job_settings
    from winnow.search import trial

    hydra = HydraConfig.get()
    folder, environment = Path(hydra.runtime.output_dir), dict(hydra.job.env_set)
    return trial.run_elsewhere(job_settings(cfg), hydra.overrides.task, folder, environment)


if __name__ == "__main__":
    main()
