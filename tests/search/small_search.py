"""A search over a small space whose trials take a moment: run, killed and started again by `test_resume`.

python -m tests.search.small_search FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from winnow.agent.samplers import TPE
from winnow.search import child, trial
from winnow.search.budget import Budget
from winnow.search.loop import Search
from winnow.search.outlook import Forecasts
from winnow.search.space import read_space
from winnow.search.study import Proposal, open_study
from winnow.search.views import Views
from winnow.types import Objective

METHODS = {
    "rtn": {"_target_": "winnow.method.rtn.RTN", "bits": 4, "group_size": 64},
    "nf4": {"_target_": "winnow.method.bnb.NF4"},
}
TRIALS = 14  # the base, 12 settings of rtn, nf4: the whole space
OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False, "bytes"))


def work(overrides: list[str], started: str, log: Any) -> dict[str, float]:
    """Stands for compressing and evaluating: a figure that depends on the strategy alone, after a while."""
    with Path(started).open("a", encoding="utf-8") as file:
        file.write(json.dumps(overrides) + "\n")
    time.sleep(0.4)
    value = sum(map(ord, "".join(overrides)))
    return {"accuracy": value % 97 / 97, "size_bytes": float(value % 89)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    child.PRELOAD = ()
    study = open_study("small", f"sqlite:///{folder / 'study.db'}", OBJECTIVES, {"model": "m"})

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        own = folder / "trials" / str(proposal.number)
        overrides = list(proposal.strategy.overrides)
        arguments = {"overrides": overrides, "started": str(folder / "started.jsonl")}
        figures = child.call("tests.search.small_search:work", arguments, child.Limits(), print, own / "log.txt")
        outcome = {
            "figures": figures,
            "sources": {},
            "reason": None,
            "message": "",
            "seconds": {},
            "overrides": overrides,
        }
        trial.write_outcome(own, outcome)
        with (folder / "finished.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(overrides) + "\n")
        return outcome

    Search(
        study=study,
        space=read_space(METHODS, {}),
        policy=TPE(startup_trials=4),
        outlook=Forecasts(lambda strategies: [{} for _ in strategies]),
        launch=launch,
        budget=Budget(trials=TRIALS),
        folder=folder,
        shared=[],
        views=Views(folder, print),
        log=print,
    ).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
