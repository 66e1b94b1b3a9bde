"""The benchmarks' own prompts, extraction and metrics, on answers that are known to be right or wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.benchmark.scripted import Scripted
from winnow.benchmark import figures
from winnow.benchmark.harness import Harness
from winnow.benchmark.samples import Sample
from winnow.benchmark.score import questions, score
from winnow.build import instantiate
from winnow.core.cli import CONF, options
from winnow.core.errors import UserError
from winnow.core.types import Figures
from winnow.data.task_spec import Spec
from winnow.data.tasks import load, quiet

ITEMS = Path(__file__).parents[1] / "data" / "benchmarks"
WITHOUT_ITEMS = ("mmlu", "nano", "perplexity", "wikitext")  # in ITEMS, or without right and wrong


def harness(name: str, **changes: Any) -> Harness:
    overrides = [f"benchmark={name}", *(f"benchmark.{key}={value}" for key, value in changes.items())]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=overrides)
    made = instantiate(cfg.benchmark, "benchmark")
    assert isinstance(made, Harness)
    return made


def ask(right: bool, name: str, **changes: Any) -> tuple[Figures, list[Sample], Scripted]:
    made = harness(name, **changes)
    adapter = Scripted(right)
    scored = []
    with quiet():
        for spec in made.specs:
            main, also = load(spec, made.data_dir, made.num_fewshot)
            scored.append((spec, score(adapter, spec, questions(main, made.limit, made.seed), also, made.seed)))
    return figures.figures(scored), [sample for _, found in scored for sample in found], adapter


@pytest.mark.parametrize("name", [name for name in options("benchmark") if name not in WITHOUT_ITEMS])
def test_gold_answers_score_one_and_wrong_ones_zero(name: str) -> None:
    right, samples, _ = ask(True, name, data_dir=ITEMS)
    wrong, _, _ = ask(False, name, data_dir=ITEMS)
    made = harness(name, data_dir=ITEMS)
    assert right["accuracy"] == 1.0 and wrong["accuracy"] == 0.0
    assert {right[spec.name] for spec in made.specs} == {1.0} and {wrong[spec.name] for spec in made.specs} == {0.0}
    assert right["items"] == len(samples) == {"bbh": 54, "five": 70}.get(name, 4)
    assert all(sample.correct and sample.score == 1 for sample in samples)
    assert set(made.scores()) <= set(right)
    assert len({sample.doc_hash for sample in samples}) == len(samples)


def test_truthfulqa_has_both_figures() -> None:
    right, samples, _ = ask(True, "truthfulqa", data_dir=ITEMS)
    wrong, _, _ = ask(False, "truthfulqa", data_dir=ITEMS)
    assert right["truthfulqa_mc2"] > 0.99 and wrong["truthfulqa_mc2"] < 0.05
    assert {"truthfulqa_stderr", "truthfulqa_mc2_stderr"} <= set(right)
    assert all(len(sample.log_likelihoods) > 1 and sample.prediction == sample.target for sample in samples)


def test_nano_scores_and_perplexity() -> None:
    right, samples, _ = ask(True, "nano", limit=12)
    wrong, _, _ = ask(False, "nano", limit=12)
    for name in harness("nano").scores():
        assert right[name] > 0.99 and wrong[name] < 0.05
    assert right["perplexity"] == pytest.approx(2.0)
    text = [sample for sample in samples if sample.benchmark == "nano_text"]
    expected = sum(s.extra["tokens"] for s in text) / sum(s.extra["bytes"] for s in text)
    assert right["bits_per_byte"] == pytest.approx(expected) and text[0].correct is None
    assert {s.subtask for s in samples if s.benchmark == "nano_bbh"} > {"word_sorting"}


def test_prompts_are_what_the_model_was_trained_on() -> None:
    from winnow.nano.items import FAMILIES, benchmark_items

    _, _, adapter = ask(True, "nano")
    shown = set(adapter.prompts)
    for family in FAMILIES:
        assert {item.prompt for item in benchmark_items(family)} <= shown


def test_likelihood_choices_are_the_completions() -> None:
    from winnow.benchmark.score import requests
    from winnow.nano.items import benchmark_items

    made = harness("nano")
    for name, index in (("nano_commonsenseqa", 1), ("nano_truthfulqa", 2)):
        with quiet():
            main, _ = load(made.specs[index])
        assert made.specs[index].name == name
        items = benchmark_items(name)
        for item, question in list(zip(items, questions(main, None, 0), strict=True))[:40]:
            made_requests = requests(question.loaded.task, 0, question, 0)
            gold = main[0].task.doc_to_target(question.doc)
            assert made_requests[gold].args == (item.prompt, item.completion)


def test_a_limit_keeps_some_items_and_a_higher_one_those_too() -> None:
    kept = {n: {s.doc_hash for s in ask(True, "nano", limit=n)[1] if s.correct is not None} for n in (5, 10)}
    assert len(kept[5]) == 25 and len(kept[10]) == 50 and kept[5] < kept[10]
    other = {s.doc_hash for s in ask(True, "nano", limit=5, seed=1)[1] if s.correct is not None}
    assert other != kept[5]


def test_exemplars_belong_to_the_item() -> None:
    whole = {s.doc_hash: s.prompt_hash for s in ask(True, "gsm8k", data_dir=ITEMS)[1]}
    part = {s.doc_hash: s.prompt_hash for s in ask(True, "gsm8k", data_dir=ITEMS, limit=2)[1]}
    assert len(part) == 2 and part.items() < whole.items()
    reseeded = {s.doc_hash: s.prompt_hash for s in ask(True, "gsm8k", data_dir=ITEMS, seed=9)[1]}
    assert reseeded.keys() == whole.keys() and reseeded != whole


def test_exemplars_are_as_many_as_wanted() -> None:
    for shots, asked in ((None, 9), (3, 4), (0, 1)):
        changes = {} if shots is None else {"num_fewshot": shots}
        _, _, adapter = ask(True, "gsm8k", data_dir=ITEMS, **changes)
        assert {prompt.count("Question:") for prompt in adapter.prompts} == {asked}
    with pytest.raises(UserError, match="num_fewshot=20"):
        ask(True, "gsm8k", data_dir=ITEMS, num_fewshot=20)


def test_own_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One document.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Two."}\n{"text": "Three."}\n', encoding="utf-8")
    found, samples, _ = ask(True, "perplexity", data_dir=tmp_path)
    assert found["items"] == len(samples) == 3 and "accuracy" not in found
    assert sum(s.extra["bytes"] for s in samples) == 14 + 4 + 6
    assert ask(True, "perplexity", data_dir=tmp_path / "a.txt")[0]["items"] == 1


@pytest.mark.parametrize("name", options("benchmark"))
def test_every_benchmark_has_its_keys(name: str) -> None:
    made = harness(name)
    assert made.name == name and made.specs
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=[f"benchmark={name}"])
    keys = {"data_dir", "limit", "num_fewshot", "batch_size", "max_gen_toks", "seed"}
    assert keys <= set(OmegaConf.to_container(cfg.benchmark))  # type: ignore[arg-type]
    assert (CONF / "benchmark" / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name, file in (("gsm8k", "gsm8k/train.jsonl"), ("bbh", "bbh/{subtask}.jsonl"), ("perplexity", ".txt")):
        with pytest.raises(UserError, match="benchmark.data_dir=.*" + file.replace("{", "\\{")):
            harness(name, data_dir=tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("not json\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.jsonl, line 1: it is not JSON"):
        ask(True, "gsm8k", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "benchmark.limit=0"),
        ({"batch_size": 0}, "benchmark.batch_size=0"),
        ({"num_fewshot": -1}, "benchmark.num_fewshot=-1"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"x": {"folder": "gsm8k"}}}, "benchmark.tasks.x.task is missing"),
        ({"tasks": {"x": {"folder": "gsm8k", "task": "gsm8k", "metrik": "acc"}}}, "metrik: there is no such key"),
        ({"tasks": {"x": {"folder": "gsm8k", "task": "gsm8k", "mean": "all"}}}, "mean=all"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Harness(**({"name": "x", "tasks": {"x": {"folder": "gsm8k", "task": "gsm8k"}}} | change))


def test_unknown_tasks_folders_filters_and_metrics_are_named() -> None:
    nano = {"folder": "nano/tasks", "task": "nano_bbh", "metric": "exact_match"}
    for change, message in (
        ({"folder": "no_such"}, "no_such is not a folder"),
        ({"task": "no_such"}, "has no such task"),
        ({"metric": "acc"}, "metric=acc: nano_bbh has exact_match"),
        ({"filter": "loose"}, "filter=loose is not one of nano_bbh; it has strip"),
    ):
        spec = Spec.read("x", nano | change)
        with pytest.raises(UserError, match=message), quiet():
            score(Scripted(True), spec, questions(load(spec)[0], 2, 0))


def test_without_items_and_network_it_says_so_in_a_line(tmp_path: Path) -> None:
    script = (
        "from winnow.data.task_spec import Spec\nfrom winnow.data.tasks import load\n"
        "from winnow.benchmark.harness import quiet\n"
        "with quiet(): load(Spec('gsm8k', 'gsm8k', 'gsm8k', data={'test': 'gsm8k/test.jsonl'}))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "winnow.core.errors.UserError: benchmark gsm8k is not on disk and there is no network; "
        "give benchmark.data_dir=FOLDER with gsm8k/test.jsonl"
    )
