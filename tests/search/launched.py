"""`small_search` as a Hydra application whose trials a real launcher runs: everything of `search.py` but the model.

python -m tests.search.launched outputs=FOLDER hydra/launcher=joblib workers=2 [+crash=true] [+seconds=600]

A trial writes lines to `jobs.jsonl` (its process), `started.jsonl` and `finished.jsonl`; with `+crash=true` the first of `nf4` takes its process with it; with `+seconds` trials other than the base model's go on for so long, unless they are stopped.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from winnow.core.cli import command


@command("search")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Stands for `trial.run`, in whatever process the launcher has chosen."""
    from tests.search import workers
    from winnow.search import child, job
    from winnow.search.outcome import write_outcome

    hydra = HydraConfig.get()
    own = Path(hydra.runtime.output_dir)
    overrides = [o for o in hydra.overrides.task if o.startswith("method")]
    with (own.parent.parent / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([os.environ.get("GIVEN"), os.getpid()]) + "\n")
    crashed = own.parent.parent / "crashed"
    if cfg.get("crash") and "nf4" in overrides[0] and not crashed.exists():
        crashed.touch()
        os._exit(1)
    figures = workers.work(overrides, 0.1, str(own.parent.parent / "started.jsonl"))
    deadline = time.monotonic() + (cfg.get("seconds", 0) if "method=[]" not in overrides else 0)
    while time.monotonic() < deadline:
        if (own / job.STOP).exists():
            raise child.Cancelled("nobody waits")
        time.sleep(0.05)
    outcome = {"figures": figures, "sources": {}, "reason": None, "message": "", "seconds": {}, "overrides": overrides}
    write_outcome(own, outcome)
    with (own.parent.parent / "finished.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(overrides) + "\n")
    return outcome


def search(config: DictConfig, arguments: list[str], launching: Any) -> None:
    """In place of `winnow.search.start.search`."""
    import logging

    from tests.search import small_search
    from winnow.agent.samplers import TPE
    from winnow.search import overrides
    from winnow.search.forecaster import Forecasts
    from winnow.search.loop import Search
    from winnow.search.views import Views
    from winnow.study.budget import Budget
    from winnow.study.opening import open_study
    from winnow.study.space import read_space

    typed = overrides.parse(arguments)
    folder = Path(config.outputs) / config.study
    folder.mkdir(parents=True)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    launching.prepare(config.workers)
    Search(
        study=open_study("small", small_search.address(folder), small_search.OBJECTIVES, {"model": {"name": "m"}}),
        space=read_space(small_search.METHODS, {}),
        policy=TPE(startup_trials=4),
        forecaster=Forecasts(lambda strategies: [{} for _ in strategies]),
        launch=lambda proposal, worker: launching.run(
            proposal.number, typed.of_trial(proposal.strategy), {"GIVEN": f"worker {worker}"}
        ),
        budget=Budget(trials=config.budget.trials),
        folder=folder,
        shared=[],
        views=Views(folder),
        workers=config.workers,
    ).run()


if __name__ == "__main__":
    from winnow.search import start

    start.search = search  # type: ignore[assignment]
    main()
