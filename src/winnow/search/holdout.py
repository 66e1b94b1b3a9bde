"""Scores the finished front once more, on items that the search has never used, and says whose place there was luck.

Whoever picks the best of many by a noisy score picks some of the noise with it. Fresh items show how much: a strategy that owed
its place to its accuracy loses it where another, no worse in anything else, is at least as accurate on them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from winnow.core import grammar
from winnow.core.errors import UserError
from winnow.search.folders import Folders
from winnow.search.trial import CONFIRMING
from winnow.search.workers import Launch, Workers
from winnow.study.policy import Suggestion
from winnow.study.study import Proposal, Study

FOLDER = "confirmation"  # in a trial's folder


def overrides(number: int) -> list[str]:
    """What makes the job of a trial the confirmation of it."""
    return [f"+{CONFIRMING}=true", f"hydra.sweep.subdir={grammar.text_of(f'trials/{number}/{FOLDER}')}"]


def confirm(study: Study, launch: Launch, workers: int, folder: Path, log: Callable[[str], None]) -> None:
    """Scores what is on the front, and the base model, on the items that were held back; what was confirmed before is not.

    One that fails is said to be unconfirmed, and keeps its place; the next start of the search tries it again.

    Args:
        launch: runs the confirmation of a trial, as a job like any trial.
        folder: of the study.
    """
    trials, jobs = Folders(folder / "trials"), Folders(folder / "trials", FOLDER)
    front = {t.number: t for t in ([study.base] if study.base else []) + list(study.on_front)}
    waiting = [trial for number, trial in front.items() if number not in study.confirmed]

    def leave_out(number: int, why: str) -> None:
        study.unconfirmed[number] = why
        log(f"confirmation: trial {number} is not confirmed: {why}")

    done, count = 0, len(waiting)
    at_work = Workers(launch, workers)
    try:
        while waiting or not at_work.idle:
            while waiting and at_work.free:
                trial = waiting.pop(0)
                if (trials.of(trial.number) / "artifact").is_dir():
                    study.pay(jobs.spent(trial.number))
                    jobs.clear(trial.number)  # of an earlier attempt
                    at_work.start(Proposal(trial.number, Suggestion(trial.strategy, FOLDER)))
                else:
                    leave_out(trial.number, "its weights are gone (keep=front keeps them)")
            if at_work.idle:
                continue
            proposal, outcome, _ = at_work.wait()
            done += 1
            study.pay(outcome.get("energy", {}))
            if outcome["reason"]:
                leave_out(proposal.number, f"{outcome['reason']}: {outcome['message']}")
                continue
            study.confirm(proposal.number, outcome["figures"])
            accuracy = outcome["figures"]["accuracy"]
            log(f"confirmation {done} of {count}: trial {proposal.number}, accuracy {accuracy:.3f} on fresh items")
    except UserError as error:  # of the launcher: the search itself has come to its end
        for number in front.keys() - study.confirmed.keys() - study.unconfirmed.keys():
            study.unconfirmed[number] = str(error)
        log(f"confirmation: the rest of the front is not confirmed: {error}")
    finally:
        at_work.stop(jobs.cancel)


def score(settings: dict[str, Any], artifact: str, output: str, log: Callable[[str], None]) -> dict[str, float]:
    """In the child: the scores of an artifact on the items that were held back."""
    from winnow import build
    from winnow.core.files import whole_folder
    from winnow.hardware.lock import shared_device
    from winnow.runtime import serving

    model = {**settings["model"], "_target_": "winnow.model.pretrained.pretrained", "path": artifact}
    benchmark = {**settings["benchmark"], "confirming": True}
    cfg = OmegaConf.create({**settings, "model": model, "benchmark": benchmark})
    hardware = build.hardware(cfg)
    hardware.check()
    lm = build.model(cfg, dequantize=hardware.runtime != "llama_cpp")  # as it was scored before
    with (
        whole_folder(Path(output)) as folder,
        shared_device(hardware.device, log),
        serving(lm, hardware, log) as served,
    ):
        return dict(build.benchmark(cfg)(lm, build.run(cfg, folder, log), served=served))


def check(held_back: float, benchmark: Any) -> None:
    """Raises UserError if there are no items to confirm on, although some are wanted."""
    if held_back and not benchmark.scores():
        raise UserError("confirm: this benchmark has no scores to confirm; set confirm=0")
