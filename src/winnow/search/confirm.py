"""Scores the finished front once more, on items that the search has never used, and says whose place there was luck.

Whoever picks the best of many by a noisy score picks some of the noise with it. Fresh items show how much: a strategy that owed
its place to its accuracy loses it where another, no worse in anything else, is at least as accurate on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow.search import child
from winnow.search.gates import matches
from winnow.search.study import Study
from winnow.types import Objective, Trial, UserError

FOLDER = "confirmation"  # in a trial's folder


def confirm(study: Study, config: DictConfig, folder: Path, log: Callable[[str], None]) -> None:
    """Scores what is on the front, and the base model, on the items that were held back; what was confirmed before is not."""
    trials = [t for t in ([study.base] if study.base else []) + list(study.on_front) if t.number not in study.confirmed]
    trials = list({t.number: t for t in trials}.values())
    settings = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]), resolve=True
    )
    for done, trial in enumerate(trials, 1):
        own = folder / "trials" / str(trial.number)
        if not (own / "artifact").is_dir():
            log(f"confirmation: trial {trial.number} has no weights any more (keep={config.keep}); it is left out")
            continue
        arguments = {"settings": settings, "artifact": str(own / "artifact"), "output": str(own / FOLDER)}
        try:
            figures = child.call(
                "winnow.search.confirm:score", arguments, child.Limits(), lambda line: None, own / "log.txt"
            )
        except child.Failed as failed:
            log(f"confirmation: trial {trial.number} could not be scored again: {failed.message}")
            continue
        study.confirm(trial.number, figures)
        log(
            f"confirmation {done} of {len(trials)}: trial {trial.number}, accuracy {figures['accuracy']:.3f} on fresh items"
        )


def score(settings: dict[str, Any], artifact: str, output: str, log: Callable[[str], None]) -> dict[str, float]:
    """In the child: the scores of an artifact on the items that were held back."""
    from winnow import build
    from winnow.hardware.lock import sharing
    from winnow.hardware.runtime import serving
    from winnow.model.save import whole_folder

    model = {**settings["model"], "_target_": "winnow.model.load.pretrained", "path": artifact}
    benchmark = {**settings["benchmark"], "confirming": True}
    cfg = OmegaConf.create({**settings, "model": model, "benchmark": benchmark})
    hardware, lm = build.hardware(cfg), build.model(cfg)
    with whole_folder(Path(output)) as folder, sharing(hardware.device, log), serving(lm, hardware, log):
        return dict(build.benchmark(cfg)(lm, build.run(cfg, folder, log)))


def luck(
    trial: Trial, front: Sequence[Trial], confirmed: Mapping[int, Mapping[str, float]], objectives: Sequence[Objective]
) -> str:
    """Why a trial's place on the front does not hold on fresh items; empty where it does, or nobody knows."""
    scores = [o for o in objectives if o.name in confirmed.get(trial.number, {})]
    others = [o for o in objectives if o not in scores]
    if not scores or any(o.name not in trial.figures for o in others):
        return ""
    mine = confirmed[trial.number]
    for rival in front:
        theirs = confirmed.get(rival.number)
        if rival.number == trial.number or theirs is None or not matches(rival, trial, others):
            continue
        if all(theirs[o.name] >= mine[o.name] if o.maximize else theirs[o.name] <= mine[o.name] for o in scores):
            return f"trial {rival.number} is no worse in anything else, and as good on fresh items"
    return ""


def check(held_back: float, benchmark: Any) -> None:
    """Raises UserError if there are no items to confirm on, although some are wanted."""
    if held_back and not benchmark.scores():
        raise UserError("confirm: this benchmark has no scores to confirm; set confirm=0")
