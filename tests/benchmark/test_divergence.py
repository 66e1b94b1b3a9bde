"""The divergence from the base model: zero for itself, what it should be for others, and computed once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from winnow.benchmark import divergence
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.rtn import RTN
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS
from winnow.runtime import serving
from winnow.runtime.transformers import Runtime, batches


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, calibration=Calibration(max_length=64), cache=tmp_path / "cache")


def full_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_base_model_is_at_no_distance_from_itself(tiny: Path, run: Run) -> None:
    lm = pretrained(str(tiny))
    with serving(lm) as served:
        found = divergence.divergence(served, divergence.reference(lm, served, run, "cpu"))
    assert found["kl_to_base"] == pytest.approx(0.0, abs=1e-6) and found["top1_agreement"] == 1.0


def test_more_damage_is_further_away_and_it_is_the_divergence_of_the_distributions(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "TOKENS", 500)
    base = pretrained(str(WEIGHTS))
    wanted = divergence.reference(base, None, run, "cpu")
    assert sum(map(len, wanted.rows)) <= divergence.TOKENS and len(wanted.tokens) == sum(
        len(r) - 1 for r in wanted.rows
    )
    distances = []
    for bits in (4, 2):
        lm = RTN(bits=bits, group_size=32)(pretrained(str(WEIGHTS)), run).lm
        with serving(base) as theirs, serving(lm) as served:
            distances.append(divergence.divergence(served, wanted)["kl_to_base"])
            vocabulary = served.vocab_size
            row = wanted.rows[0]
            columns, p = theirs.next_tokens(row, vocabulary)
            _, q = served.next_tokens(row, columns)
            top = divergence.kl_of_top(p[:, : divergence.TOP], q[:, : divergence.TOP]).mean()
            assert top == pytest.approx(full_kl(p, q), rel=0.1) and top <= full_kl(p, q) + 1e-5
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize("soft", [False, True])
def test_rows_at_once_are_what_they_are_one_at_a_time(soft: bool, tiny: Path) -> None:
    lm = pretrained(str(tiny))
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4], [9, 8, 7, 6, 5]]
    if soft:
        peft = pytest.importorskip("peft")
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        lm = lm.with_model(peft.get_peft_model(lm.model, settings))
    with serving(lm) as served:
        assert isinstance(served, Runtime)
        served.model.float()
        served.batch_logits = 14 * served.vocab_size  # two of the longest
        likeliest = served.next_tokens_batch(rows, 20)
        wanted = [np.arange(4 * (len(row) - 1)).reshape(-1, 4) for row in rows]
        told = served.next_tokens_batch(rows, wanted)
        for row, columns, (tokens, values), (same, others) in zip(rows, wanted, likeliest, told, strict=True):
            plain_tokens, plain_values = served.next_tokens(row, 20)
            assert np.array_equal(tokens, plain_tokens) and np.allclose(values, plain_values, atol=1e-5)
            assert np.array_equal(same, columns)
            assert np.allclose(others, served.next_tokens(row, columns)[1], atol=1e-5)


def test_rows_of_like_lengths_go_together_up_to_what_fits() -> None:
    lengths = [3, 9, 4, 9, 1, 30]
    assert batches(lengths, 18) == [[5], [1, 3], [2, 0, 4]]
    assert batches(lengths, 0) == [[5], [1], [3], [2], [0], [4]]  # a processor: one by one


def test_the_reference_is_computed_once_and_by_what_it_depends_on(
    tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = divergence.reference(pretrained(str(tiny)), None, run, "cpu")
    other = divergence.reference(pretrained(str(tiny)), None, dataclasses.replace(run, seed=1), "cpu")
    assert other.rows != first.rows
    monkeypatch.setattr(divergence, "_compute_reference", None)  # would fail if it were asked again
    again = divergence.reference(pretrained(str(tiny)), None, run, "cpu")
    assert again.rows == first.rows and np.array_equal(again.tokens, first.tokens)
    assert np.allclose(again.log_probabilities, first.log_probabilities)


@pytest.mark.parametrize("kept", [0, 100, -200])
def test_a_damaged_reference_is_computed_anew(tiny: Path, run: Run, kept: int) -> None:
    first = divergence.reference(pretrained(str(tiny)), None, run, "cpu")
    (entry,) = (run.folder / "cache" / divergence.FOLDER).iterdir()
    entry.write_bytes(entry.read_bytes()[:kept])
    again = divergence.reference(pretrained(str(tiny)), None, run, "cpu")
    assert again.rows == first.rows and np.array_equal(again.tokens, first.tokens)
    assert list(entry.parent.iterdir()) == [entry] and divergence._load(entry).rows == first.rows


def test_hopeless_distributions_are_far_away_and_finite() -> None:
    p = np.log(np.array([[0.9, 0.05], [0.5, 0.5]]))
    q = np.array([[-200.0, -0.01], [-np.inf, 0.0]])
    found = divergence.kl_of_top(p, q)
    assert np.isfinite(found).all() and (found > 10).all()
