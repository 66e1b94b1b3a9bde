"""lm-eval's model over llama.cpp: the scores and answers of a GGUF file in single precision are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from tests.benchmark.test_score import harness
from winnow.benchmark import samples
from winnow.benchmark.adapters import scorer
from winnow.core.errors import UserError
from winnow.data.tasks import quiet
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained
from winnow.runtime import serving


@pytest.fixture
def scorers(nano_f32: Path) -> Iterator[tuple[Any, Any]]:
    """llama.cpp's and transformers', four sequences at a time."""
    lm, other = pretrained(str(nano_f32)), trained(dtype="float32")
    with quiet(), serving(lm) as llama, serving(other) as reference:
        yield scorer(llama, lm, 4), scorer(reference, other, 4)


def test_every_item_is_answered_as_by_transformers(
    nano_f32: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    limit = None if request.config.getoption("--all-shapes") else 25
    found = []
    for name, lm in (("gguf", pretrained(str(nano_f32))), ("transformers", trained(dtype="float32"))):
        (tmp_path / name).mkdir()
        harness("nano", limit=limit)(lm, Run(tmp_path / name))
        found.append(samples.read(tmp_path / name))
    assert len(found[0]) == (2200 if limit is None else 150)
    for ours, theirs in zip(*found, strict=True):
        assert (ours.doc_hash, ours.prompt_hash) == (theirs.doc_hash, theirs.prompt_hash)
        assert (ours.prediction, ours.correct) == (theirs.prediction, theirs.correct)
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-3)
        assert ours.extra.get("response") == theirs.extra.get("response")


def test_contexts_of_all_kinds_score_alike(scorers: tuple[Any, Any]) -> None:
    many = [("Question: Where is a tent?\nAnswer:", f" the {word}") for word in "camp sea cave bank lake park".split()]
    pairs = [
        *many,  # more choices than sequences
        *(("Is it?\nAnswer:", answer) for answer in (" yes", " no")),
        ("Trailing space ", "moves"),
        ("", "No context."),
        ("Anna goes to the market. " * 200, "Anna goes to the bank."),  # longer than the model's context
        many[0],
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    (found, expected) = (scorer.loglikelihood(asked) for scorer in scorers)
    for (mine, greedy), (reference, reference_greedy) in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, abs=2e-3) and greedy == reference_greedy


def test_texts_longer_than_the_context_score_alike(scorers: tuple[Any, Any]) -> None:
    texts = ["Anna goes home.", "Tom takes an axe for chopping. " * 150]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    (found, expected) = (scorer.loglikelihood_rolling(asked) for scorer in scorers)
    assert found == pytest.approx(expected, rel=1e-4)
    assert [scorers[0].count_tokens(t) for t in texts] == [scorers[1].count_tokens(t) for t in texts]


def test_answers_end_at_the_same_place(scorers: tuple[Any, Any]) -> None:
    prompts = [f"{name} goes to the forest to look for a" for name in "Anna Tom Ben Clara David Emma Felix".split()]
    prompts += ["<bos>Tom takes an axe", "Noah " * 2000]
    for until, most in ((["."], 12), (["\n"], 30), ([" Anna", "chop", "goes to"], 40), ([], 7)):
        settings = {"until": until, "max_gen_toks": most, "do_sample": False}
        # lm-eval writes into the settings
        asked = [
            [Instance("generate_until", {}, (p, {**settings, "until": [*until]}), i) for i, p in enumerate(prompts)]
            for _ in scorers
        ]
        found, expected = (scorer.generate_until(a) for scorer, a in zip(scorers, asked, strict=True))
        assert found == expected
        assert not any(stop in text for stop in until for text in found)


def test_the_length_of_answers_is_limited(nano_f32: Path) -> None:
    lm = pretrained(str(nano_f32))
    with serving(lm) as served:
        limited = scorer(served, lm, 2, 3)
        asked = [Instance("generate_until", {}, ("Anna goes to", {"until": ["\n"], "max_gen_toks": 50}), 0)]
        (text,) = limited.generate_until(asked)
        assert len(limited.tok_encode(text, add_special_tokens=False)) <= 3
        assert limited.generate_until([]) == []


def test_sampling_is_refused(scorers: tuple[Any, Any]) -> None:
    asked = Instance("generate_until", {}, ("Anna", {"until": ["\n"], "do_sample": True, "temperature": 0.7}), 0)
    with pytest.raises(UserError, match="answers greedily"):
        scorers[0].generate_until([asked])


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_other_families_score_alike(family: str, tmp_path: Path) -> None:
    """Gemma-3 has layers with a sliding window, whose cache is one of its own; the choices must share that, too."""
    for library in ("llama_cpp", "gguf"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'winnow[gguf]'")
    from tests.method.shapes import random_model
    from winnow.model.gguf.export import export

    reference = pretrained(str(random_model(family, tmp_path / family)), dtype="float32")
    folder = tmp_path / "gguf"
    folder.mkdir()
    export(reference, folder / "model-F32.gguf", "F32")
    reference.model.config.save_pretrained(folder)
    reference.tokenizer.save_pretrained(folder)
    pairs = [("Anna goes to the market. " * n + "Where?", f" the {w} and") for n in (0, 30) for w in ("camp", "sea")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    lm = pretrained(str(folder))
    with quiet(), serving(lm) as llama, serving(reference) as expected:
        found = scorer(llama, lm, 4).loglikelihood(asked)
        wanted = scorer(expected, reference, 4).loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=2e-3)
