"""What a search pays besides compressing, scoring and measuring; how quickly help answers; how long a whole evaluation takes.

    python bench/overhead.py

`trial_overhead_s` is the median, over consecutive trials of a real search on the embedded model, of the time from one proposal to
the next less the time that the trial's two children spent on their work: proposing, composing, starting processes, recording,
and writing the views are in it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path

from common import Result, command, report, seconds

TRIALS = 8


def trial_overhead(folder: Path) -> list[float]:
    """Seconds of overhead of each trial but the last, whose successor would tell when it ended."""
    import optuna

    command(
        "search.py",
        f"outputs={folder}",
        "study=bench",
        f"budget.trials={TRIALS}",
        "method=[magnitude,rtn]",
        "benchmark.limit=10",
        "hardware.seconds=0.2",
        "hardware.energy_tokens=32",
        "wandb.mode=disabled",
    )
    study = optuna.load_study(study_name="bench", storage=f"sqlite:///{folder / 'bench' / 'study.db'}")
    trials = [t for t in study.trials if "record" in t.user_attrs]
    overheads = []
    for trial, following in itertools.pairwise(trials):
        spent = trial.user_attrs["record"]["seconds"]
        total = (following.datetime_start - trial.datetime_start).total_seconds()
        overheads.append(total - spent["compress"] - spent["evaluate"])
        print(
            f"trial {trial.number}: {total:.2f} s, compress {spent['compress']:.2f}, evaluate {spent['evaluate']:.2f}"
        )
    return overheads


def evaluation(folder: Path) -> float:
    """Seconds of the whole evaluation of the embedded model: its benchmarks on all items, and the meters."""
    command("evaluate.py", f"output={folder / 'evaluation'}")
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    print("evaluation:", ", ".join(f"{name} {value:.1f} s" for name, value in metrics["seconds"].items()))
    return float(sum(metrics["seconds"].values()))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        help_s = max(
            seconds(lambda: command("search.py", "--help")), seconds(lambda: command("search.py", "--cfg", "job"))
        )
        results = [
            Result("help_s", help_s, 1.0, "lower"),
            Result("trial_overhead_s", statistics.median(trial_overhead(folder)), 0.5, "lower"),
            Result("evaluation_s", evaluation(folder), 45.0, "lower"),
        ]
    report("overhead", results)


if __name__ == "__main__":
    main()
