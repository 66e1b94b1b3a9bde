"""What can be trained on packed rows is tried, not listed; both ways of feeding a model have the same loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.data.encoding import Encoded, collate, collate_padded
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.training.fit import Batching, fit
from winnow.training.module import Schedule
from winnow.training.objective import CrossEntropy
from winnow.training.packed_rows import Documents
from winnow.training.student import Student


def stateful() -> Any:
    """A model whose convolutions look back across documents, whatever `position_ids` say: LFM2, one block of each kind."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    return Lfm2ForCausalLM(config).float()


def rows(vocabulary: int, count: int = 40) -> list[Encoded]:
    torch.manual_seed(2)
    made = [torch.randint(5, vocabulary, (4 + 5 * (i % 7),)).tolist() for i in range(count)]
    return [Encoded(ids, ((2, len(ids)),)) for ids in made]


def test_a_model_with_a_state_falls_back_to_padded_rows_and_says_so(tmp_path: Path, log_lines: list[str]) -> None:
    model = stateful()
    student = Student(model)
    assert not student.packs
    before = [p.detach().clone() for p in model.parameters()]
    fitted = fit(model, rows(200), Schedule(1e-2, 3), Batching(64), Run(tmp_path), student=student)
    assert fitted.steps == 3
    assert any("padded, not packed" in line for line in log_lines)
    assert any(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))


def test_packed_and_padded_losses_and_gradients_agree(tiny: Path) -> None:
    student = Student(pretrained(str(tiny), dtype="float32").model)
    assert student.packs
    some = rows(500, 6)
    found = []
    for batch in (collate(some), collate_padded(some, 0)):
        student.zero_grad()
        total = CrossEntropy()(student, batch)
        total.backward()
        found.append([total.detach(), *(p.grad.clone() for p in student.parameters())])
    assert found[0][0] > 0
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_loss_is_the_models_own(tiny: Path) -> None:
    """That of transformers, document by document."""
    model = pretrained(str(tiny), dtype="float32").model
    some = rows(500, 6)
    expected = 0.0
    for row in some:
        labels = torch.tensor([[-100] * row.answer_start + row.ids[row.answer_start :]])
        out = model(input_ids=torch.tensor([row.ids]), labels=labels)
        expected += out.loss.item() * row.target_count
    assert CrossEntropy()(Student(model), collate(some)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (2, 2), (4, 1)])
def test_each_target_of_a_step_weighs_the_same_however_it_is_cut_up(tiny: Path, devices: int, accumulate: int) -> None:
    """The devices' batches of a step, each divided by the targets of all: the gradient of the mean over the same documents."""
    student = Student(pretrained(str(tiny), dtype="float32").model)
    some = rows(500, 24)
    data = Documents(some, 64, 0)
    seen: list[int] = []
    for rank in range(devices):
        for batch in itertools.islice(data.steps(devices, accumulate, rank), accumulate):
            seen += batch["documents"]
            (CrossEntropy()(student, batch) / batch["step_targets"]).backward()
    cut = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    whole = [some[i] for i in seen]
    (CrossEntropy()(student, collate(whole)) / sum(row.target_count for row in whole)).backward()
    for one, p in zip(cut, student.parameters(), strict=True):
        assert (one - p.grad).norm() <= 1e-5 * p.grad.norm()
