"""A search over a small space whose trials take a moment: run, killed and started again by tests and by `bench/kill_search.py`.

python -m tests.search.small_search FOLDER [seconds=0.4] [workers=1] [url=postgresql://...] [grace=180]

Of each trial a line goes to `started.jsonl` when its work begins, and to `finished.jsonl` when its outcome is on the disk.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from winnow.agent.samplers import TPE
from winnow.core.cli import INTERRUPTED
from winnow.core.errors import UserError
from winnow.core.types import Objective
from winnow.search import child, fork_server, job, loop, start
from winnow.search.forecaster import Forecasts
from winnow.search.loop import Search
from winnow.search.outcome import write_outcome
from winnow.search.views import Views
from winnow.study import storage
from winnow.study.budget import Budget
from winnow.study.opening import open_study
from winnow.study.space import read_space
from winnow.study.study import Proposal

METHODS = {
    "rtn": {"_target_": "winnow.method.rtn.RTN", "bits": 4, "group_size": 64},
    "nf4": {"_target_": "winnow.method.bnb.NF4"},
}
TRIALS = 14  # the base, 12 settings of rtn, nf4: the whole space
OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False, "bytes"))


def address(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def main(
    folder: Path,
    url: str = "",
    workers: int = 1,
    seconds: float = 0.4,
    grace: float = storage.GRACE_S,
    beside: Path | None = None,
) -> None:
    """Args:
    beside: the folder of another search that shares the study: neither begins without the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fork_server.PRELOAD, loop.WAIT_S = (), 0.05
    fork_server.server = fork_server.ForkServer()  # its own, not that of the process it was forked from
    storage.GRACE_S, storage.BEAT_S = grace, grace / 10
    signal.signal(signal.SIGTERM, start._interrupt)
    storage.claim(url or address(folder), "small")
    study = open_study("small", url or address(folder), OBJECTIVES, {"model": {"name": "m"}})
    (folder / "ready").touch()
    while beside is not None and not (beside / "ready").exists():
        time.sleep(0.02)

    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        own = folder / "trials" / str(proposal.number)
        overrides = list(proposal.strategy.overrides)
        pause = seconds if proposal.strategy.methods else 0.0  # the others wait for the base model
        arguments = {"overrides": overrides, "seconds": pause, "started": str(folder / "started.jsonl")}
        figures = child.call(
            "tests.search.workers:work",
            arguments,
            child.Limits(),
            own / "log.txt",
            cancelled=(own / job.STOP).exists,
        )
        outcome = {
            "figures": figures,
            "sources": {},
            "reason": None,
            "message": "",
            "seconds": {},
            "overrides": overrides,
        }
        write_outcome(own, outcome)
        with (folder / "finished.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(overrides) + "\n")
        return outcome

    Search(
        study=study,
        space=read_space(METHODS, {}),
        policy=TPE(startup_trials=4),
        forecaster=Forecasts(lambda strategies: [{} for _ in strategies]),
        launch=launch,
        budget=Budget(trials=TRIALS),
        folder=folder,
        shared=[],
        views=Views(folder),
        workers=workers,
    ).run()


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    types = {"url": str, "workers": int, "seconds": float, "grace": float}
    try:
        main(Path(sys.argv[1]), **{name: types[name](value) for name, value in given.items()})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except UserError as error:
        sys.exit(str(error))
