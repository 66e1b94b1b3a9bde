"""What is learned from a teacher: losses against plain references, and cached targets against the teacher itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import Encoded, collate, encode
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS
from winnow.training import teacher_targets as module
from winnow.training import zeros
from winnow.training.losses import forward_kl, reverse_kl
from winnow.training.objective import Distillation, SampledDistillation, block_outputs, evenly_spaced, relative_distance
from winnow.training.optimizer import build_optimizer
from winnow.training.student import Student
from winnow.training.teacher import load_frozen
from winnow.training.teacher_targets import (
    BYTES_PER_TOKEN,
    FILES,
    Sampling,
    Targets,
    load_or_compute_targets,
    max_bytes_per_position,
    run_lengths,
    systematic_sample,
)

VOCABULARY = 1024
DEFAULT = Sampling()


def rows_for(lm: LM, count: int, longest: int = 128) -> list[Encoded]:
    return encode(documents(Calibration(), count, seed=0), lm.tokenizer, longest)


def batch_of(rows: list[Encoded]) -> dict[str, Any]:
    return {**collate(rows), "documents": list(range(len(rows)))}


def student_of(path: Path, layers: list[int]) -> Student:
    """The model of a folder with some of its layers only."""
    model: Any = pretrained(str(path), dtype="float32").model
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    return Student(model)


def cached(teacher: LM, rows: list[Encoded], folder: Path, sampling: Sampling = DEFAULT, **known: Any) -> Targets:
    settings: dict[str, Any] = {"load": lambda: load_frozen(teacher, "cpu"), **known}
    return load_or_compute_targets(teacher, rows, sampling, folder, VOCABULARY, **settings)


def test_systematic_samples_are_unbiased_and_nowhere_off_by_a_whole_count() -> None:
    torch.manual_seed(0)
    p = torch.randn(4, 50).mul(2).softmax(-1)
    seen = torch.zeros_like(p, dtype=torch.float64)
    for _ in range(4000):
        ids = systematic_sample(p, torch.rand(4), 20)
        counts = torch.stack([row.bincount(minlength=50) for row in ids])
        assert ((counts - 20 * p).abs() < 1 + 1e-4).all()
        seen += counts
    torch.testing.assert_close(seen / (20 * 4000), p.double(), atol=2e-3, rtol=0)


def test_samples_are_counted_and_read_back(tmp_path: Path, tiny: Path) -> None:
    ids = torch.tensor([[1, 1, 5, 9], [9, 9, 9, 9], [0, 2, 2, 3]])
    assert [x.tolist() for x in run_lengths(ids)] == [[1, 5, 9, 9, 0, 2, 3], [2, 1, 1, 4, 1, 2, 1], [3, 1, 3]]
    teacher = pretrained(str(tiny), dtype="float32")
    rows = rows_for(teacher, 20)
    rows[3] = Encoded(rows[3].ids, ())  # without a target, amid others and at the end
    rows[19] = Encoded(rows[19].ids, ())
    found = cached(teacher, rows, tmp_path)
    chosen = [7, 3, 0, 12, 19]
    ids_nk, shares_nk = found.at_documents(chosen)
    assert len(ids_nk) == sum(rows[i].target_count for i in chosen)
    torch.testing.assert_close(shares_nk.sum(-1), torch.ones(len(shares_nk)))
    hidden, _ = load_frozen(teacher, "cpu").at_targets(collate([rows[i] for i in chosen]))
    p = load_frozen(teacher, "cpu").head(hidden).softmax(-1)
    assert (p.gather(-1, ids_nk)[shares_nk > 0] > 0).all()
    dense = torch.zeros_like(p).scatter_add_(-1, ids_nk, shares_nk)
    assert ((dense - p).abs() * 60 < 1.001).all()  # that is: in the right order


def test_a_token_takes_at_most_320_bytes(tmp_path: Path, tiny: Path) -> None:
    assert max_bytes_per_position(60, 128_256) + 8 <= BYTES_PER_TOKEN  # even where a document has a single target
    teacher = pretrained(str(tiny))
    rows = rows_for(teacher, 30)
    cached(teacher, rows, tmp_path)
    (folder,) = [path for path in (tmp_path / "targets").iterdir() if path.is_dir()]
    stored = sum(file.stat().st_size for file in folder.iterdir())
    assert stored <= BYTES_PER_TOKEN * sum(row.target_count for row in rows)


def test_the_gradient_of_cached_targets_is_the_teachers(tmp_path: Path) -> None:
    teacher = pretrained(str(WEIGHTS), dtype="float32")
    rows = rows_for(teacher, 60)
    student = student_of(WEIGHTS, [0, 3, 4])
    batch = batch_of(rows)
    gradients = []
    for objective in (
        Distillation(load_frozen(teacher, "cpu"), forward_kl),
        SampledDistillation(cached(teacher, rows, tmp_path)),
    ):
        student.zero_grad()
        objective(student, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert batch["input_ids"].numel() > 2000
    assert F.cosine_similarity(*(g.double() for g in gradients), dim=0) > 0.99


def test_targets_are_computed_once_for_the_same_documents(tmp_path: Path, tiny: Path) -> None:
    teacher = pretrained(str(tiny))
    rows = rows_for(teacher, 12)
    first = cached(teacher, rows, tmp_path).at_documents([0, 5])

    def never() -> Student:
        raise AssertionError("the teacher was loaded again")

    again = cached(teacher, rows, tmp_path, load=never).at_documents([0, 5])
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for other, sampling in ((rows[:-1], Sampling()), (rows, Sampling(seed=1)), (rows, Sampling(temperature=2.0))):
        with pytest.raises(AssertionError, match="loaded again"):
            cached(teacher, other, tmp_path, sampling, load=never)


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 200)
    teacher = pretrained(str(tiny), dtype="float32")
    rows = rows_for(teacher, 40)
    whole = cached(teacher, rows, tmp_path / "whole")
    sampled, calls = module._sample_targets, 0

    def dying(*arguments: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return sampled(*arguments)

    monkeypatch.setattr(module, "_sample_targets", dying)
    with pytest.raises(KeyboardInterrupt):
        cached(teacher, rows, tmp_path / "cut")
    (partial,) = (tmp_path / "cut" / "targets").glob("*.partial")
    for name in FILES[:3]:  # a batch whose last file was not written any more
        with (partial / f"{name}.bin").open("ab") as file:
            file.write(b"half-written")
    monkeypatch.setattr(module, "_sample_targets", sampled)
    log_lines.clear()
    resumed = cached(teacher, rows, tmp_path / "cut")
    assert any("going on at document" in line for line in log_lines)
    for name in FILES:
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))


def test_a_damaged_folder_is_made_anew(tmp_path: Path, tiny: Path) -> None:
    teacher = pretrained(str(tiny))
    rows = rows_for(teacher, 12)
    before = cached(teacher, rows, tmp_path).at_documents(range(12))
    (folder,) = [path for path in (tmp_path / "targets").iterdir() if path.is_dir()]
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(10)
    after = cached(teacher, rows, tmp_path).at_documents(range(12))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_distillation_is_the_plain_mixture(tiny: Path, divergence: Any) -> None:
    teacher = load_frozen(pretrained(str(tiny), dtype="float32"), "cpu")
    student = student_of(tiny, [1])
    batch = batch_of(rows_for(pretrained(str(tiny)), 8))
    found = Distillation(teacher, divergence, alpha=0.3, hidden_weight=2.0)(student, batch)
    hidden, targets = student.at_targets(batch)
    theirs, _ = teacher.at_targets(batch)
    states: list[list[torch.Tensor]] = [[], []]
    for model, kept in zip((student, teacher), states, strict=True):
        with block_outputs(model, batch, kept):
            model.at_targets(batch)
    distance = (relative_distance(states[0][0], states[1][1]) + relative_distance(hidden, theirs)) / 2
    logits = student.head(hidden)
    expected = 0.7 * divergence(logits, teacher.head(theirs)) + 0.3 * F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(found, expected + 2.0 * distance)
    wanted = torch.autograd.grad(expected + 2.0 * distance, list(student.parameters()))
    found.backward()
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_layers_are_mapped_evenly() -> None:
    assert evenly_spaced(5, 3) == [1, 2, 4]
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced(32, 2) == [15, 31]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_optimizer_moves_a_zero(tiny: Path, optimizer: str) -> None:
    model = student_of(tiny, [0, 1]).model
    pruned = model.model.layers[0].mlp.up_proj.weight
    zero = torch.rand(pruned.shape) < 0.5
    pruned.data[zero] = 0
    before = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    made = build_optimizer(model, optimizer, 0.01, 0.1)
    with zeros.keep_zeros(model) as count:
        assert count == 1
        for _ in range(3):
            made.zero_grad()
            model(input_ids=torch.arange(10)[None]).logits.square().mean().backward()
            assert not pruned.grad[zero].any()
            made.step()
            assert torch.equal(pruned == 0, zero)
    for name, linear in linears(model).items():
        assert not torch.equal(linear.weight, before[name]), name
