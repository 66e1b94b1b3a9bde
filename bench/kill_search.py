"""SIGKILL of a search's whole process group at random moments, with restarts: what is lost, repeated or broken by it.

    python bench/kill_search.py kills=200

The search is the real one, over a small space; its trials only wait (0.1 s) where others compress and score. A search that has come
to its end is counted, and another one is begun. Kills hit the search while it starts and recovers, while it proposes and writes,
and while a trial's child is at work.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import REPOSITORY, Result, report

TRIAL_S = 0.1


def main(arguments: list[str]) -> None:
    import random

    sys.path.insert(0, str(REPOSITORY))
    from tests.search import kills

    settings = {"kills": "200", "seed": "0"} | dict(argument.split("=", 1) for argument in arguments)
    wanted, rng = int(settings["kills"]), random.Random(int(settings["seed"]))
    counts, searches = kills.Counts(), 0
    with tempfile.TemporaryDirectory() as scratch:
        while counts.kills < wanted:
            folder = Path(scratch) / str(searches)
            kills.kill_often(folder, wanted, rng, counts, TRIAL_S)
            kills.end(folder, counts, TRIAL_S)
            searches += 1
    print(f"{counts.kills} kills of {searches} searches, {counts.in_trial} of them while a trial was at work")
    report(
        "kill_search",
        [
            Result("kills", counts.kills, wanted, "higher"),
            Result("finished_trials_lost", counts.lost, 0, "lower"),
            Result("finished_trials_repeated", counts.repeated, 0, "lower"),
            Result("unreadable_studies", counts.unreadable, 0, "lower"),
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
