"""What is peculiar to public benchmarks: which choice a metric takes, blanks in the context, last words, long texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from tests.benchmark.scripted import Scripted
from tests.benchmark.test_score import ITEMS, harness
from winnow.benchmark import figures
from winnow.benchmark.samples import Sample
from winnow.benchmark.score import first_words, questions, score
from winnow.core.errors import UserError
from winnow.core.types import Figures
from winnow.data.local_items import rows
from winnow.data.task_spec import Spec
from winnow.data.tasks import load, quiet
from winnow.model.lm import LM
from winnow.nano.embedded import untrained

NORMALISED = ["arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa"]


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield untrained(32, 64, 2, 2, 256, seed=0)
    torch.set_num_threads(threads)


def asked(adapter: Any, name: str, **changes: Any) -> tuple[Figures, list[Sample]]:
    """The figures and samples of a benchmark of one task, whose description `changes` alter."""
    made = harness(name, data_dir=ITEMS)
    spec = Spec.read(name, {**next(iter(made.tasks.values())), **changes})
    with quiet():
        main, _ = load(spec, made.data_dir)
        found = score(adapter, spec, questions(main, None, 0))
    return figures.figures([(spec, found)]), found


class Shorter(Scripted):
    """Finds a choice likelier the shorter it is, but by the character the longer it is."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-math.sqrt(len(request.args[1])), False) for request in requests]


@pytest.mark.parametrize("name", NORMALISED)
def test_the_score_weighs_a_choice_by_its_length_and_acc_does_not(name: str) -> None:
    found, samples = asked(Shorter(True), name)
    plain, by_likelihood = asked(Shorter(True), name, metric="acc", further=[])
    for longest, shortest in zip(samples, by_likelihood, strict=True):
        lengths = [round(value**2) - 1 for value in longest.log_likelihoods]  # without the space before a choice
        assert len(longest.prediction) == max(lengths) and len(shortest.prediction) == min(lengths)
    # predictions are ours and scores lm-eval's
    assert found[name] == sum(s.prediction == s.target for s in samples) / len(samples)
    assert found[f"{name}_acc"] == plain[name] == sum(s.prediction == s.target for s in by_likelihood) / len(samples)
    assert f"{name}_acc_stderr" in found and f"{name}_acc" in harness(name).scores()


def test_items_that_a_task_rewrites_show_no_progress_bars(capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    asked(Scripted(True), "hellaswag")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_a_blank_is_filled_in_the_context() -> None:
    class Seen(Scripted):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            self.seen = [request.args for request in requests]
            return super().loglikelihood(requests)

    transformers_adapter = Seen(True)
    _, samples = asked(transformers_adapter, "winogrande")
    items = [row for _, row in rows(ITEMS / "winogrande" / "validation.jsonl")]
    shown = [(item["sentence"].replace("_", item[f"option{n}"])) for item in items for n in (1, 2)]
    assert [context + continuation for context, continuation in transformers_adapter.seen] == shown
    ends = [item["sentence"].partition("_")[2] for item in items for _ in (1, 2)]
    assert [continuation for _, continuation in transformers_adapter.seen] == ends
    assert [s.target for s in samples] == [i["sentence"].partition("_")[0] + i[f"option{i['answer']}"] for i in items]
    assert all(s.prediction == s.target for s in samples)


def test_last_words_are_those_of_a_plain_reference(lm: LM) -> None:
    import torch

    from winnow.benchmark.transformers_adapter import Adapter

    with quiet():
        found, samples = asked(Adapter(lm.model, lm.tokenizer, batch_size=3), "lambada")
    expected, greedy = [], []
    for _, item in rows(ITEMS / "lambada_openai" / "test.jsonl"):
        context, _, word = item["text"].rpartition(" ")
        start, whole = (lm.tokenizer(text)["input_ids"] for text in (context, f"{context} {word}"))
        with torch.no_grad():
            logits = lm.model(torch.tensor([whole])).logits[0, len(start) - 1 : -1].float().log_softmax(-1)
        ids = torch.tensor(whole[len(start) :])
        expected.append(logits.gather(-1, ids[:, None]).sum().item())
        greedy.append(bool((logits.argmax(-1) == ids).all()))
    assert [s.log_likelihoods[0] for s in samples] == pytest.approx(expected, abs=1e-3)
    assert found["lambada_perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    assert found["lambada"] == sum(greedy) / len(greedy) and [s.correct for s in samples] == greedy
    assert "lambada_perplexity" not in harness("lambada").scores()


def test_a_last_word_that_is_not_greedy_is_not_predicted() -> None:
    right, wrong = (asked(Scripted(answer), "lambada")[1] for answer in (True, False))
    assert [s.prediction for s in right] == [s.target for s in right] == [" florist", " chore", " losers", " Serena"]
    assert {s.prediction for s in wrong} == {""} and {s.correct for s in wrong} == {False}


@pytest.mark.parametrize(("window", "words"), [(None, None), (100, None), (None, 150), (64, 40)])
def test_texts_are_those_of_a_plain_reference(
    lm: LM, window: int | None, words: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from winnow.benchmark import transformers_adapter

    monkeypatch.setattr(
        transformers_adapter, "LOGITS_BYTES", 4 * lm.model.config.vocab_size * 200
    )  # one or three windows at a time
    with quiet():
        made = transformers_adapter.Adapter(lm.model, lm.tokenizer, batch_size=4)
        found, samples = asked(made, "wikitext", window=window, words=words)
    length, nats, tokens, sizes, counts = window or 256, 0.0, 0, 0, 0
    for _, item in rows(ITEMS / "wikitext2" / "test.jsonl"):
        page = item["page"] if words is None else first_words(item["page"], words)
        counts += len(page.split()) + page[0].isspace() + page[-1].isspace()  # lm-eval counts empty ends, too
        sizes += len(page.encode())
        ids = lm.tokenizer(wikitext_detokenizer({"page": page}), add_special_tokens=False)["input_ids"]
        tokens += len(ids)
        before = [lm.tokenizer.bos_token_id, *ids]
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            first = max(0, end - length) if start else 0  # the last window is filled up from the left
            with torch.no_grad():
                logits = lm.model(torch.tensor([before[first:end]])).logits[0].float().log_softmax(-1)
            target = torch.tensor(ids[start:end])
            nats -= logits[start - first :].gather(-1, target[:, None]).sum().item()
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / counts), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(nats / sizes / math.log(2), rel=1e-4)
    assert found["items"] == len(samples) == 3 and "accuracy" not in found


def test_what_is_left_out_of_a_text_shows_in_the_prompts_hash_alone() -> None:
    whole, cut, narrow = (
        {s.doc_hash: s.prompt_hash for s in asked(Scripted(True), "wikitext", **changes)[1]}
        for changes in ({}, {"words": 100}, {"window": 64})
    )
    assert whole.keys() == cut.keys() == narrow.keys()
    assert not set(whole.values()) & set(narrow.values()) and len(set(whole.values()) & set(cut.values())) == 1


def test_the_first_words_keep_their_white_space() -> None:
    assert first_words(" = A =\n\n b  c ", 4) == " = A =\n\n b  "
    assert first_words(" a b \n", 2) == first_words(" a b \n", 9) == " a b \n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": None, "window": 1}, "window=1 is not a whole number of at least 2"),
        ({"metric": None, "words": True}, "words=True is not"),
        ({"words": 5}, "words is for text"),
        ({"further": ["f1"]}, r"further=\['f1'\]: piqa has acc, acc_norm"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        asked(Scripted(True), "piqa", **change)
