"""Where training documents come from, and what is never among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from winnow.benchmark.held_out import benchmark_of
from winnow.model.calibration import calibration_batches
from winnow.model.load import pretrained
from winnow.recovery.corpus import documents
from winnow.types import Calibration, Document, Run, UserError

ITEMS = Path(__file__).parents[1] / "data" / "benchmarks"


def written(path: Path, *rows: dict[str, str]) -> Calibration:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Calibration(source=str(path))


def test_documents_come_from_files(tmp_path: Path) -> None:
    rows = [{"text": "plain"}, {"question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}]
    found = documents(written(tmp_path / "a.jsonl", *rows), 10, seed=0)
    expected = [Document("", "plain"), Document("Question: q\nAnswer:", " a"), Document("p", "c")]
    assert sorted(found, key=str) == sorted(expected, key=str)
    with pytest.raises(UserError, match="it has the fields title, body"):
        documents(written(tmp_path / "b.jsonl", {"title": "x", "body": "y"}), 1, seed=0)
    (tmp_path / "c.txt").write_text("first paragraph\nof two lines\n\nsecond\n")
    found = documents(Calibration(source=str(tmp_path / "c.txt")), 10, seed=0)
    assert {d.completion for d in found} == {"first paragraph\nof two lines", "second"}


def test_the_seed_decides_which_documents(tmp_path: Path) -> None:
    calibration = written(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100)))
    drawn = [documents(calibration, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_benchmarks_training_split_is_worded_as_the_benchmark_words_it() -> None:
    calibration = Calibration(source="gsm8k", data_dir=str(ITEMS))
    rows = [json.loads(line) for line in (ITEMS / "gsm8k" / "train.jsonl").open()]
    expected = [Document(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    assert sorted(documents(calibration, 10_000, seed=0), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("name", "file", "field"),
    [
        ("gsm8k", "gsm8k/test.jsonl", "question"),
        ("commonsense_qa", "commonsense_qa/validation.jsonl", "question"),
        ("truthfulqa", "truthful_qa/validation.jsonl", "question"),
        ("humaneval", "openai_humaneval/test.jsonl", "prompt"),
        ("bbh", "bbh/date_understanding.jsonl", "input"),
    ],
)
def test_test_items_are_refused(tmp_path: Path, name: str, file: str, field: str) -> None:
    items = [json.loads(line)[field] for line in (ITEMS / file).open()]
    assert items
    for item in items:
        assert benchmark_of(item) == name
    hidden = {"text": f"Some words before.\n\n{items[0].upper()}"}
    with pytest.raises(UserError, match=f"line 2 is a test item of {name}"):
        documents(written(tmp_path / "a.jsonl", {"text": "fine"}, hidden), 1, seed=0)


def test_nothing_of_a_training_split_is_refused() -> None:
    for line in (ITEMS / "gsm8k" / "train.jsonl").open():
        assert all(benchmark_of(value) is None for value in json.loads(line).values())


def test_the_embedded_models_test_items_are_refused(tmp_path: Path) -> None:
    from winnow.nano.items import benchmark_items

    item = benchmark_items("nano_gsm8k", 1)[0]
    with pytest.raises(UserError, match="test item of nano_gsm8k"):
        documents(written(tmp_path / "a.jsonl", {"prompt": item.prompt, "completion": " 4"}), 1, seed=0)


@pytest.mark.parametrize("source", ["nothing.jsonl", "mmluu", "folder/"])
def test_an_unknown_source_names_those_there_are(source: str) -> None:
    with pytest.raises(UserError, match=r"calibration\.source=.*nano.*\.jsonl.*hub:"):
        documents(Calibration(source=source), 1, seed=0)


def test_batches_hold_every_row_once_and_no_padding(tiny: Path, tmp_path: Path) -> None:
    lm = pretrained(str(tiny))
    batches, sha256 = calibration_batches(lm, Run(tmp_path, calibration=Calibration(samples=50, max_length=40)))
    assert sum(len(batch) for batch in batches) == 50
    assert max(batch.shape[1] for batch in batches) <= 40
    assert not any((batch == lm.tokenizer.pad_token_id).any() for batch in batches)
    again = calibration_batches(
        pretrained(str(tiny)), Run(tmp_path, calibration=Calibration(samples=50, max_length=40))
    )
    other = calibration_batches(lm, Run(tmp_path, seed=1, calibration=Calibration(samples=50, max_length=40)))
    assert sha256 == again[1] != other[1]
