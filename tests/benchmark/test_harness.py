"""The probe as a whole, on a small random model: what it writes, that it repeats, and that it leaves nothing behind."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmark.test_score import harness
from winnow.benchmark import samples
from winnow.benchmark.harness import PRELOAD, Harness
from winnow.benchmark.protocol import Probe
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.nano.embedded import untrained


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of so small a model wait for each other, above all on a busy machine
    yield untrained(32, 64, 2, 2, 256, seed=0)
    torch.set_num_threads(threads)


@pytest.fixture
def small() -> Harness:
    return harness("nano", limit=6, batch_size=4, max_gen_toks=8)


def test_a_run_repeats_and_leaves_nothing_behind(lm: LM, small: Harness, tmp_path: Path, log_lines: list[str]) -> None:
    import datasets  # noqa: F401  (which sets its level when it is imported)

    assert isinstance(small, Probe)
    lm.model.train()
    lm.tokenizer.pad_token = None
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
    before = dict(os.environ), list(warnings.filters), lm.tokenizer.padding_side
    results = []
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            results.append(small(lm, Run(folder=tmp_path / name)))
        assert lm.model.training and lm.tokenizer.pad_token is None
    finally:
        lm.model.eval()
        lm.tokenizer.pad_token = "<pad>"
    assert (dict(os.environ), list(warnings.filters), lm.tokenizer.padding_side) == before
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert results[0] == results[1]
    assert samples.read(tmp_path / "a") == samples.read(tmp_path / "b")
    assert log_lines[0].startswith("nano_gsm8k: 6 items, 0.000 ± 0.000, ") and len(log_lines) == 12
    assert results[0]["items"] == 36 and 200 < results[0]["perplexity"] < 5000
    assert {*small.scores(), "accuracy", "accuracy_stderr", "bits_per_byte"} <= set(results[0])


def test_nothing_is_said_but_through_the_log(
    lm: LM, small: Harness, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small(lm, Run(folder=tmp_path))
    said = capfd.readouterr()
    assert said.out == "" and said.err == "" and not caplog.records


def test_scores_are_those_of_lm_eval(lm: LM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from winnow.benchmark.transformers_adapter import Adapter

    pairs = [("Question: Where is a tent?\nAnswer:", f" {word}") for word in ("camp", "the sea", "camp", "a")]
    pairs += [("Trailing space ", "moves"), ("", "No context.")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    prompts = ["def f(x):\n", "Q: Sort the words: b a\nA:", "A much longer prompt, so that the others are padded."]
    generating = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    generations = [Instance("generate_until", {}, (prompt, dict(generating)), i) for i, prompt in enumerate(prompts)]
    with quiet():
        ours = Adapter(lm.model, lm.tokenizer, batch_size=4)
        theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)
        found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
        texts = ours.generate_until(generations), theirs.generate_until(generations, disable_tqdm=True)
    for (mine, greedy), (reference, reference_greedy) in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, abs=1e-4) and greedy == reference_greedy
    assert texts[0] == texts[1]


def test_text_is_predicted_token_by_token_after_bos(lm: LM) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from winnow.benchmark.transformers_adapter import Adapter

    text = "Anna goes to the market. " * 60  # longer than the model's 256 positions
    with quiet():
        adapter = Adapter(lm.model, lm.tokenizer, batch_size=3)
        short = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("Anna goes home.",), 0)])[0]
        long = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])[0]
    ids = torch.tensor([lm.tokenizer.encode("Anna goes home.")])  # with <bos>
    with torch.no_grad():
        logits = lm.model(ids).logits.log_softmax(-1)
    expected = logits[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()
    assert short == pytest.approx(expected, abs=1e-4)
    assert adapter.count_tokens("Anna goes home.") == ids.shape[1] - 1
    assert adapter.count_tokens(text) > 256 and -10 * adapter.count_tokens(text) < long < -5 * adapter.count_tokens(
        text
    )


def test_preloaded_modules_exist() -> None:
    import importlib.util

    assert all(importlib.util.find_spec(name) for name in PRELOAD)
