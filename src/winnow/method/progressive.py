"""Progressive pruning prunes in rounds and distils from the original model after each, until the target is reached.

python compress.py method=[progressive] method.progressive.amount=0.4
python compress.py method=[progressive,rtn] method.progressive.pruner=wanda method.progressive.amount=0.7
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.distill import Distilling
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)

PRUNERS = ("depth", "width", "wanda", "magnitude")
LEAST_SHARE = 0.02  # smallest share of the layers that a round of depth pruning can drop


@dataclass(frozen=True)
class Progressive(Distilling):
    """Prunes to `amount` in up to `rounds` steps, each followed by a training in which the model as it was is the teacher.

    The result has exactly the shape, or as many zeros, as the pruner alone makes at `amount`. Where a round would have nothing
    to take away (few layers, coarse widths) there are fewer rounds. A killed run goes on at the step it had reached.

    Attributes:
        pruner: at its defaults but for how much it takes: depth (layers), width (MLP channels), wanda or magnitude (weights).
        amount: the share that is taken away in the end.
        rounds: of pruning and training.
        steps: of the training in each round.

    Source: Minitron: Muralidharan et al. 2024, arXiv:2407.14679, section 3 (retraining by distillation) and section 2.3
        (iterated pruning); the pruners' own are with them.
    Calibration: the pruner's texts, anew in every round; the trainings' documents, as many as the steps need, the same in all.
    Cost: `rounds` times that of the pruner and of `distill` together (from the code); a copy of the model on disk meanwhile.
    Writes: dense safetensors of the model's own architecture, as the pruner does.
    Loaded by: all that load what the pruner writes.
    """

    slot: ClassVar[Slot] = Slot.PRUNE
    measured_with: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-4, "tokens_per_batch": 2048, "steps": 100}

    pruner: str = knob("depth", choices=PRUNERS)
    amount: float = knob(0.4, low=0.05, high=0.75, search_range=(0.1, 0.6))
    rounds: int = knob(3, low=1, high=20, search=False)

    @property
    def matrices(self) -> tuple[str, ...] | None:  # type: ignore[override]
        matrices: tuple[str, ...] | None = self._pruner_at(self.amount).matrices
        return matrices

    def predict(self, plan: ModelLayout) -> ModelLayout:
        pruned: ModelLayout = self._pruner_at(self.amount).predict(plan)
        return pruned

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        first: BaseStage
        first, *later = self.schedule(plan.config)
        pruned = first.predict(plan)
        first_round = first.work(plan, calibration).then(
            self.training_work(dataclasses.replace(pruned, base=plan), calibration)
        )
        return first_round.times(1 + len(later))  # later rounds are slightly cheaper

    def schedule(self, config: PretrainedConfig) -> list[Any]:
        """Returns the pruning stage of each round, for a model of this configuration.

        Raises:
            UserError: the pruner refuses the model.
        """
        last = self._pruner_at(self.amount)
        if self.pruner == "depth":
            sizes = _sizes(
                config.num_hidden_layers, last.remaining_layers(config.num_hidden_layers), self.rounds, 1, LEAST_SHARE
            )
        elif self.pruner == "width":
            sizes = _sizes(
                config.intermediate_size, last.narrow_config(config).intermediate_size, self.rounds, last.multiple, 0.0
            )
        else:  # each round adds equally many zeros
            return [*(self._pruner_at(self.amount * done / self.rounds) for done in range(1, self.rounds)), last]
        if len(sizes) == 2:
            return [last]
        return [self._pruner_at(1 - after / before) for before, after in itertools.pairwise(sizes)]

    def _pruner_at(self, amount: float) -> Any:
        from winnow.method.depth import Depth
        from winnow.method.prune import Magnitude, Wanda
        from winnow.method.width import Width

        if self.pruner == "width":
            return Width(mlp=1 - amount)
        return (
            Depth(share=amount) if self.pruner == "depth" else (Wanda if self.pruner == "wanda" else Magnitude)(amount)
        )

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.model.save import save
        from winnow.model.unfused import prepare_for_stage
        from winnow.training.teacher import open_teacher

        path = lm.path or run.base
        if path is None:
            raise UserError(
                "method=[progressive] needs a model in a folder or on the hub, which it can load as teacher"
            )
        stages = self.schedule(lm.model.config)
        teacher = open_teacher(path, lm, "model.path")
        rows = self.documents_for(lm, teacher, run)
        folder = run.folder / f"progressive-{self._fingerprint(teacher, run)}"
        done, records = 0, list[dict[str, Any]]()
        for number in range(1, len(stages) + 1):
            if (_round_folder(folder, number) / "manifest.json").is_file():
                done = number
        if done:
            logger.info(f"progressive: going on after round {done} of {len(stages)}")
            lm, records = _restore(lm, _round_folder(folder, done))
        for number, stage in enumerate(stages[done:], done + 1):
            round_run = dataclasses.replace(run, folder=folder / f"round-{number}", cache=run.cache or run.folder)
            round_run.folder.mkdir(parents=True, exist_ok=True)
            prepare_for_stage(lm.model, self.matrices)  # a restored model has the form of its architecture
            logger.info(f"progressive: round {number} of {len(stages)}: {type(stage).__name__.lower()}")
            lm, notes = stage(lm, round_run)
            records.append({**notes, "training": self.learn(lm.model, teacher, rows, round_run)})
            lm.manifest["_rounds"] = records
            save(lm, _round_folder(folder, number))
            del lm.manifest["_rounds"]
            for old in (round_run.folder, _round_folder(folder, number - 1)):
                shutil.rmtree(old, ignore_errors=True)
        return StageResult(lm, {"rounds": records})

    def _fingerprint(self, teacher: LM, run: Run) -> str:
        from winnow.data.corpus import content

        data = [dataclasses.asdict(run.calibration), content(run.calibration)]
        fields = [dataclasses.asdict(self), teacher.sha256(), run.seed, data]
        return hashlib.sha256(json.dumps(fields, default=str).encode()).hexdigest()[:12]


def _sizes(size: int, goal: int, rounds: int, multiple: int, least_share: float) -> list[int]:
    """Returns sizes from `size` to `goal` in at most `rounds` even steps of multiples, each of at least `least_share`."""
    for count in range(rounds, 1, -1):
        sizes = [
            size,
            *(goal + multiple * round((size - goal) * to_go / count / multiple) for to_go in range(count)[::-1]),
        ]
        if all(after < before and 1 - after / before >= least_share for before, after in itertools.pairwise(sizes)):
            return sizes
    return [size, goal]


def _round_folder(folder: Path, number: int) -> Path:
    """Returns the folder of the model after a round; a failed run keeps files named `.ckpt`, as a training's checkpoint."""
    return folder / f"round-{number}.ckpt"


def _restore(lm: LM, folder: Path) -> tuple[LM, list[dict[str, Any]]]:
    """Returns the lineage of `lm` with the model of a finished round, and the records of the rounds so far."""
    from winnow.model.pretrained import pretrained

    loaded = pretrained(str(folder), **{**dataclasses.asdict(lm.loading), "dtype": "auto", "device": "cpu"})
    records = loaded.manifest["_rounds"]
    return lm.with_model(loaded.model), records
