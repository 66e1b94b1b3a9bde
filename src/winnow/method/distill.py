"""Distillation trains a student on a teacher's distribution over each next token, which says more than the token itself.

python compress.py method=[depth,distill] method.depth.share=0.3
python compress.py method=[distill] method.distill.student={num_hidden_layers:3}
python train.py model=local model.path=PRUNED method=[distill] method.distill.teacher_path=BASE method.distill.teacher=cached
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import StageResult, knob
from winnow.method.trainable import Training
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.data.encoding import Encoded
    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout
    from winnow.training.losses import Loss
    from winnow.training.objective import Objective
    from winnow.training.student import Student

logger = logging.getLogger(__name__)

LOSSES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Distilling(Training):
    """Base of the stages that distil: the loss, the teacher, and the training of all of a student's weights.

    Attributes:
        loss: divergence of the student's distribution from the teacher's.
        beta: parameter of the generalised Jensen-Shannon divergence; near 0 it is like forward KL, near 1 like reverse KL.
        temperature: softens both distributions.
        alpha: share of the cross entropy with the text; the rest is `loss`.
        hidden_weight: weight of the mean relative squared distance of hidden states, at the end and after evenly mapped layers.
        teacher: `online` runs it at every step; `cached` runs it once for each document and does not load it again.
        samples: number of cached samples of the teacher's distribution at each position.
    """

    steps: int = knob(200, low=1, high=10_000_000, search=False)
    tokens_per_batch: int = knob(4096, low=32, high=100_000_000, search=False)
    learning_rate: float = knob(1e-4, low=1e-6, high=1e-1, log=True, search_range=(3e-5, 1e-3))
    optimizer: str = knob("adamw", choices=("adamw", "muon"), search=False)
    loss: str = knob("forward_kl", choices=LOSSES)
    beta: float = knob(0.5, low=0.01, high=0.99, when={"loss": "jsd"}, search=False)
    temperature: float = knob(1.0, low=0.1, high=20.0, search=False)
    alpha: float = knob(0.0, low=0.0, high=1.0, search_range=(0.0, 0.5))
    hidden_weight: float = knob(0.0, low=0.0, high=1000.0, search=False)
    teacher: str = knob("online", choices=("online", "cached"), search=False)
    samples: int = knob(60, low=1, high=60, search=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher != "cached":
            return
        if self.loss != "forward_kl":
            raise UserError(
                f"{self.option}.loss={self.loss} clashes with {self.option}.teacher=cached: a sample of the teacher's "
                f"distribution gives an unbiased gradient of forward_kl only; take loss=forward_kl, or teacher=online"
            )
        if self.hidden_weight:
            raise UserError(
                f"{self.option}.hidden_weight={self.hidden_weight:g} clashes with {self.option}.teacher=cached, which "
                f"keeps no hidden states; set it to 0, or take teacher=online"
            )

    @property
    def divergence(self) -> Loss:
        """The loss function of the student's logits [N, V] and the teacher's."""
        from winnow.training import losses

        if self.loss == "jsd":
            return functools.partial(losses.jensen_shannon, temperature=self.temperature, beta=self.beta)
        kl = {"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl}[self.loss]
        return functools.partial(kl, temperature=self.temperature)

    def documents_for(self, lm: LM, teacher: LM, run: Run) -> list[Encoded]:
        """Returns the documents of one training, no more than its steps read, so that no unused target is computed."""
        from winnow.training.teacher import context_length

        longest = min(self.max_length, context_length(teacher) or self.max_length)
        rows = dataclasses.replace(self, max_length=longest).encode_documents(lm, run)
        tokens_needed, tokens = self.steps * self.tokens_per_batch, 0
        for count, row in enumerate(rows):
            if tokens >= tokens_needed and count >= 64 + self.held_out:
                return rows[: count + self.held_out]
            tokens += len(row.ids)
        return rows

    def learn(self, model: Any, teacher: LM, rows: Sequence[Encoded], run: Run) -> dict[str, Any]:
        """Trains all weights of `model` in place, except pruned ones, which stay zero; returns the record of the training."""
        import torch

        from winnow.hardware.compute import FLOAT32
        from winnow.model.packing import cast_weights
        from winnow.training import zeros
        from winnow.training.student import Student

        dtype, home = model.dtype, model.device
        if run.compute_dtype == FLOAT32:
            teacher.set_default_dtype(FLOAT32)
        cast_weights(model, torch.float32)
        student = Student(model.requires_grad_(True))
        objective = self._objective(student, teacher, rows, run)
        with zeros.keep_zeros(model) as sparse_layers:
            if sparse_layers:
                logger.info(f"the zeros of {sparse_layers} pruned matrices are kept")
            fitted = self.train(
                model,
                rows,
                run,
                learning_rate=self.learning_rate,
                optimizer=self.optimizer,
                objective=objective,
                student=student,
            )
        cast_weights(model, dtype)
        model.to(home)
        return fitted.record()

    def _objective(self, student: Student, teacher: LM, rows: Sequence[Encoded], run: Run) -> Objective:
        from winnow.training.dist_env import local_device
        from winnow.training.objective import Distillation, SampledDistillation
        from winnow.training.teacher import load_frozen
        from winnow.training.teacher_targets import Sampling, load_or_compute_targets

        def load() -> Student:
            return load_frozen(teacher, local_device(run))

        if self.teacher == "cached":
            vocabulary = student.base.config.get_text_config().vocab_size
            sampling = Sampling(self.samples, self.temperature, run.seed)
            targets = load_or_compute_targets(teacher, rows, sampling, run.cache or run.folder, vocabulary, load)
            teacher.release()
            return SampledDistillation(targets, self.temperature, self.alpha)
        loaded_teacher = load()
        student.packs = student.packs and loaded_teacher.packs  # both read the same rows
        return Distillation(loaded_teacher, self.divergence, self.alpha, self.hidden_weight)

    def training_work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        """Returns the cost of training a student of this layout, its teacher included."""
        from winnow.estimate.cost import StageCost

        parameters = sum(t.numel for t in plan.tensors.values())
        training = self.cost(plan, calibration, parameters, adapters=False)
        base = plan.base or plan
        teaching = StageCost(
            flops=2 * self.steps * self.tokens_per_batch * sum(t.numel for t in base.tensors.values()),
            device_bytes=base.memory_bytes,
        )
        return teaching.then(training) if self.teacher == "cached" else teaching + training


@dataclass(frozen=True)
class Distill(Distilling):
    """Trains all weights of a student to put out what its teacher puts out for the same text.

    The student is the model that the stage is given, pruned by the stages before or as an artifact; or one cut out of it by
    `student`: evenly spaced layers, the first and the last among them, and where a width shrinks the first channels, heads
    and dimensions. Zeros of pruned matrices stay zero. With `teacher=cached` the teacher's targets are sparse samples, kept
    for every student that uses the same documents.

    Attributes:
        teacher_path: folder or hub id of the teacher; null: the model that the pipeline began with.
        student: sizes of the student, as {num_hidden_layers: 3, intermediate_size: 512}; null: the model as it is.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; for language models reverse KL: Gu et al. 2023,
        arXiv:2306.08543, eq. 1; generalised JSD: Agarwal et al. 2023, arXiv:2306.13649, eq. 1; cached samples: Anshumann et
        al. 2025, arXiv:2503.16870, section 4, there drawn independently, here systematically.
    Calibration: documents of the same source, as many as the steps need; the loss is on completions.
    Cost: 6 N operations a token and step for a student of N parameters and 2 M for a teacher of M, which `teacher=cached`
        pays once for each document; on the device 16 bytes a weight of the student, the teacher in its own type, and a
        batch's activations; at most 320 bytes a token on disk for cached targets (derived from the code).
    Writes: dense safetensors in the student's own type.
    Loaded by: all that load the student.
    """

    slot: ClassVar[Slot] = Slot.RECOVER
    matrices: ClassVar[tuple[str, ...] | None] = None
    measured_after: ClassVar[tuple[str, ...]] = ("depth",)
    measured_with: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-4, "tokens_per_batch": 2048}

    teacher_path: str | None = None
    student: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is not None:
            from winnow.method.student_init import check_shape

            if isinstance(self.student, str) or not hasattr(self.student, "items"):
                raise UserError(
                    f"{self.option}.student={self.student}: give sizes, as {{num_hidden_layers: 3}}, or null"
                )
            object.__setattr__(self, "student", dict(self.student))
            check_shape(self.student, f"{self.option}.student")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        if self.student is None:
            return plan
        from winnow.method.depth import check_alike
        from winnow.method.student_init import check_blocks, student_config

        check_blocks(plan.config, self.student)
        if "num_hidden_layers" in self.student:
            check_alike(plan.tensors.values(), plan.spec.name, "distill")
        return plan.reshaped(student_config(plan.config, self.student, f"{self.option}.student"))

    def check(self, plan: ModelLayout, base: LM, run: Run) -> None:
        from winnow.training.teacher import check_pair, check_widths

        super().check(plan, base, run)
        teacher = self._teacher(base, run)
        check_pair(teacher, base, f"{self.option}.teacher_path")
        if self.hidden_weight:
            check_widths(teacher, self.predict(plan).config, f"{self.option}.hidden_weight")

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        return self.training_work(self.predict(plan), calibration)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.method.student_init import slice_student, student_config

        teacher = self._teacher(lm, run)
        self._check_differs(lm, teacher)
        config = student_config(lm.model.config, self.student or {}, f"{self.option}.student")
        rows = self.documents_for(lm, teacher, run)
        model = slice_student(lm.model, config) if self.student else lm.model
        record = self.learn(model, teacher, rows, run)
        notes = {"training": record, "teacher": {"name": teacher.name, "sha256": teacher.sha256()}}
        return StageResult(lm.with_model(model), notes)

    def _teacher(self, lm: LM, run: Run) -> LM:
        """Returns the teacher without loading its weights.

        Raises:
            UserError: there is no teacher, or it is the student itself.
        """
        from winnow.training.teacher import open_teacher

        option = f"{self.option}.teacher_path"
        path = self.teacher_path or run.base or lm.path
        if path is None:
            raise UserError(
                f"{option} is not set, and the model that the pipeline began with lies in no folder; give one"
            )
        return open_teacher(str(path), lm, option)

    def _check_differs(self, lm: LM, teacher: LM) -> None:
        """Raises UserError if the student is identical to the teacher."""
        if lm.path is not None and self.student is None and lm.sha256() == teacher.sha256():
            raise UserError(
                f"method=[distill]: teacher and student are the same model, {teacher.path}, so there is nothing to learn; prune "
                f"first (method=[depth,distill]), give {self.option}.student={{num_hidden_layers: ...}}, or name another "
                f"teacher with {self.option}.teacher_path=FOLDER"
            )
