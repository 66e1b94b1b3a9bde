"""Defines the training objectives: cross entropy on the text, or distillation from a teacher.

An objective takes the student, as held by `winnow.training.module.Recovery`, and a batch. It returns the sum of its loss over the
positions that have a target, computed from their last hidden states.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from winnow.training.losses import Loss, chunked, cross_entropy, mixed, sampled_kl

if TYPE_CHECKING:
    from winnow.training.student import Student
    from winnow.training.teacher_targets import Targets


class Objective(Protocol):
    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the sum of the loss over all targets of a batch."""
        ...


class CrossEntropy:
    """Cross entropy on the text."""

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        hidden_nh, targets_n = student.at_targets(batch)
        return chunked(cross_entropy, hidden_nh, student.head, targets_n)


class Distillation:
    """The divergence from a teacher on the same tokens, mixed with cross entropy on the text.

    Neither model's full logits are stored: the teacher's are computed from its hidden states in chunks, like the student's.

    Args:
        teacher: a frozen model on the student's device.
        divergence: function of the student's logits [N, V] and the teacher's logits [N, V].
        alpha: share of the cross entropy.
        hidden_weight: weight of the distance between hidden states, which must have the same width.
    """

    def __init__(self, teacher: Student, divergence: Loss, alpha: float = 0.0, hidden_weight: float = 0.0) -> None:
        self.teacher, self.hidden_weight = teacher, hidden_weight
        head = teacher.head

        def with_head(student_nv: torch.Tensor, teacher_nh: torch.Tensor) -> torch.Tensor:
            return divergence(student_nv, head(teacher_nh))

        self.loss = functools.partial(mixed, divergence=with_head, alpha=alpha)

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        student_states: list[torch.Tensor] = []
        teacher_states: list[torch.Tensor] = []
        with torch.no_grad(), self._collected_states(self.teacher, batch, teacher_states):
            teacher_nh, _ = self.teacher.at_targets(batch)
        with self._collected_states(student, batch, student_states):
            hidden_nh, targets_n = student.at_targets(batch)
        total = chunked(self.loss, hidden_nh, student.head, targets_n, teacher_nh)
        if self.hidden_weight:
            teacher_layers = evenly_spaced(len(teacher_states), len(student_states))
            pairs = [
                *((student_states[i], teacher_states[j]) for i, j in enumerate(teacher_layers)),
                (hidden_nh, teacher_nh),
            ]
            total = total + self.hidden_weight * sum(relative_distance(s, t) for s, t in pairs) / len(pairs)
        return total

    def _collected_states(
        self, model: Student, batch: dict[str, Any], states: list[torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return block_outputs(model, batch, states) if self.hidden_weight else contextlib.nullcontext()


class SampledDistillation:
    """The divergence from a teacher's cached targets (`winnow.training.teacher_targets`), mixed with cross entropy on the text."""

    def __init__(self, targets: Targets, temperature: float = 1.0, alpha: float = 0.0) -> None:
        self.targets = targets
        divergence = functools.partial(sampled_kl, temperature=temperature)
        self.loss = functools.partial(mixed, divergence=divergence, alpha=alpha)

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        hidden_nh, targets_n = student.at_targets(batch)
        ids_nk, shares_nk = (x.to(hidden_nh.device) for x in self.targets.at_documents(batch["documents"]))
        return chunked(self.loss, hidden_nh, student.head, targets_n, ids_nk, shares_nk)


def evenly_spaced(layers: int, count: int) -> list[int]:
    """Returns, for each of `count` layers, the index of the one of `layers` at the same relative depth; the last for the last."""
    return [((i + 1) * layers + count // 2) // count - 1 for i in range(count)]


def relative_distance(student_nh: torch.Tensor, teacher_nh: torch.Tensor) -> torch.Tensor:
    """Returns the sum over positions of |s - t|^2 / |t|^2, in single precision."""
    s, t = student_nh.float(), teacher_nh.float()
    return ((s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).sum()


@contextlib.contextmanager
def block_outputs(model: Student, batch: dict[str, Any], states: list[torch.Tensor]) -> Iterator[None]:
    """Appends each block's output at the positions with a target, [N, H], to `states` inside the context."""
    from winnow.data.encoding import IGNORED
    from winnow.model.layers import decoder_blocks

    has_target = batch["targets"] != IGNORED

    def append(module: Any, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[has_target])

    handles = [block.register_forward_hook(append) for block in decoder_blocks(model.base)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
