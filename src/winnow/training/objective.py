"""What a training minimises: text, or what a teacher makes of it.

An objective takes the last hidden states of the positions that have a target, and gives the sum of its loss over them; it sees
the whole batch, and the student as `winnow.training.module.Recovery` knows it.
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
    from winnow.training.targets import Targets


class Objective(Protocol):
    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the loss over all targets of a batch."""
        ...


class CrossEntropy:
    """The text itself."""

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        hidden_nh, targets_n = student.at_targets(batch)
        return chunked(cross_entropy, hidden_nh, student.head, targets_n)


class Distillation:
    """What a teacher makes of the same tokens, mixed with the text.

    Neither model's logits ever exist in full: the teacher's are made of its hidden states a chunk at a time, like the student's.

    Args:
        teacher: frozen, on the student's device.
        divergence: of logits [N, V] and the teacher's logits [N, V].
        alpha: share of the cross entropy.
        hidden_weight: of the distance between hidden states, which must be of one width.
    """

    def __init__(self, teacher: Student, divergence: Loss, alpha: float = 0.0, hidden_weight: float = 0.0) -> None:
        self.teacher, self.hidden_weight = teacher, hidden_weight
        head = teacher.head

        def with_head(student_nv: torch.Tensor, teacher_nh: torch.Tensor) -> torch.Tensor:
            return divergence(student_nv, head(teacher_nh))

        self.loss = functools.partial(mixed, divergence=with_head, alpha=alpha)

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        mine: list[torch.Tensor] = []
        theirs: list[torch.Tensor] = []
        with torch.no_grad(), self._watched(self.teacher, batch, theirs):
            teacher_nh, _ = self.teacher.at_targets(batch)
        with self._watched(student, batch, mine):
            hidden_nh, targets_n = student.at_targets(batch)
        total = chunked(self.loss, hidden_nh, student.head, targets_n, teacher_nh)
        if self.hidden_weight:
            pairs = [
                *((mine[i], theirs[j]) for i, j in enumerate(evenly(len(theirs), len(mine)))),
                (hidden_nh, teacher_nh),
            ]
            total = total + self.hidden_weight * sum(relative_distance(s, t) for s, t in pairs) / len(pairs)
        return total

    def _watched(
        self, model: Student, batch: dict[str, Any], states: list[torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return block_outputs(model, batch, states) if self.hidden_weight else contextlib.nullcontext()


class SampledDistillation:
    """What a teacher made of the same documents once (`winnow.training.targets`), mixed with the text."""

    def __init__(self, targets: Targets, temperature: float = 1.0, alpha: float = 0.0) -> None:
        self.targets = targets
        divergence = functools.partial(sampled_kl, temperature=temperature)
        self.loss = functools.partial(mixed, divergence=divergence, alpha=alpha)

    def __call__(self, student: Student, batch: dict[str, Any]) -> torch.Tensor:
        hidden_nh, targets_n = student.at_targets(batch)
        ids_nk, shares_nk = (x.to(hidden_nh.device) for x in self.targets.of(batch["documents"]))
        return chunked(self.loss, hidden_nh, student.head, targets_n, ids_nk, shares_nk)


def evenly(layers: int, count: int) -> list[int]:
    """For each of `count` layers in a row, the one of `layers` that lies as deep; the last for the last."""
    return [((i + 1) * layers + count // 2) // count - 1 for i in range(count)]


def relative_distance(student_nh: torch.Tensor, teacher_nh: torch.Tensor) -> torch.Tensor:
    """The sum over positions of |s - t|^2 / |t|^2, in single precision."""
    s, t = student_nh.float(), teacher_nh.float()
    return ((s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).sum()


@contextlib.contextmanager
def block_outputs(model: Student, batch: dict[str, Any], states: list[torch.Tensor]) -> Iterator[None]:
    """Meanwhile what each block puts out at the positions with a target, [N, H], is appended to `states`."""
    from winnow.data.encoding import IGNORED
    from winnow.model.layers import decoder_blocks

    chosen = batch["targets"] != IGNORED

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[chosen])

    handles = [block.register_forward_hook(keep) for block in decoder_blocks(model.base)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
