"""The loss, the batches and the loop, against plain references; and a training that is cut off goes on as if it was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from winnow.model.load import pretrained
from winnow.recovery.corpus import documents
from winnow.recovery.data import IGNORED, Document, Documents, batches, collate, encode
from winnow.recovery.module import Schedule, token_loss
from winnow.types import Calibration, Run


def test_the_loss_is_the_mean_over_target_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :4] = IGNORED
    labels[2, :] = IGNORED
    total, count = 0.0, 0
    for b in range(3):
        for t in range(1, 7):
            if labels[b, t] != IGNORED:
                total -= logits[b, t - 1].log_softmax(-1)[labels[b, t]].item()
                count += 1
    assert token_loss(logits, labels).item() == pytest.approx(total / count, rel=1e-6)


def test_batches_hold_every_document_once_under_the_token_limit() -> None:
    lengths = [3 + (7 * i) % 50 for i in range(1000)]
    made = list(batches(lengths, 256, seed=1, epoch=0))
    assert sorted(i for batch in made for i in batch) == list(range(1000))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 256 for batch in made)
    assert made == list(batches(lengths, 256, seed=1, epoch=0))
    assert made != list(batches(lengths, 256, seed=1, epoch=1))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in made)
    assert padded < 1.1 * sum(lengths)


def test_the_loss_is_on_the_completion_only(tiny: Path) -> None:
    tokenizer = pretrained(str(tiny)).tokenizer
    rows = encode([Document("Question: 1 + 1?\nAnswer:", " 2"), Document("", "Tom has 3 eggs.")], tokenizer, 64)
    batch = collate(rows, tokenizer.pad_token_id)
    answers = [tokenizer.decode([t for t in row.tolist() if t != IGNORED]) for row in batch["labels"]]
    assert answers == [" 2<eos>", "Tom has 3 eggs.<eos>"]
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()


def test_schedule_warms_up_holds_and_ends_at_zero() -> None:
    schedule = Schedule(1.0, 100, warmup=0.1, decay=0.2)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0.0


class Cut(Exception):
    """The training was cut off."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_that_is_cut_off_goes_on_bit_for_bit(tiny: Path, tmp_path: Path, optimizer: str) -> None:
    from winnow.recovery import fit as fitting

    def train(folder: Path, cut_after: int | None = None) -> dict[str, torch.Tensor]:
        lm = pretrained(str(tiny), dtype="float32")
        rows = encode(documents(Calibration(), 200, seed=0), lm.tokenizer, 64)
        data = Documents(rows, lm.tokenizer.pad_token_id, 256, seed=0)
        folder.mkdir(exist_ok=True)
        steps = 0

        def log(line: str) -> None:
            nonlocal steps
            steps += 1
            if cut_after and steps > cut_after:
                raise Cut

        run = Run(folder, log=log)
        schedule = Schedule(1e-3, 12, optimizer=optimizer)
        fitting.fit(lm.model, data, schedule, run, checkpoint_minutes=1e-6, log_seconds=0)
        return {k: v.clone() for k, v in lm.model.state_dict().items()}

    whole = train(tmp_path / "whole")
    with pytest.raises(Cut):
        train(tmp_path / "cut", cut_after=6)
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").exists()
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
