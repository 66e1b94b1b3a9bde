"""Where training documents come from, and what is never among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Chat, Document
from winnow.data.calibration import calibration_batches
from winnow.data.contamination import benchmark_of
from winnow.data.corpus import _benchmarks, _item_documents, _split_text, documents
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained

ITEMS = Path(__file__).parents[1] / "data" / "benchmarks"


def written(path: Path, *rows: Any) -> Calibration:
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


def said(*turns: str) -> tuple[dict[str, str], ...]:
    """A conversation in which user and assistant take turns."""
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*said("hi", "hello")]}, said("hi", "hello")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            ({"role": "system", "content": "s"}, *said("q", "a")),
        ),
        ({"instruction": "add", "output": "3", "input": "1 2", "text": "all of it"}, said("add\n\n1 2", "3")),
        ({"instruction": "add", "output": "3", "input": ""}, said("add", "3")),
    ],
)
def test_rows_that_are_chats(tmp_path: Path, row: dict[str, Any], expected: tuple[dict[str, str], ...]) -> None:
    assert documents(written(tmp_path / "a.jsonl", row), 1, seed=0) == [Chat(expected)]


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "line 2: messages is no list of messages with role and content"),
        ({"messages": [USER, {"content": "x"}]}, "line 2: message 2 of messages has no role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "line 2: message 2 of messages has no content"),
        ({"messages": [USER]}, "line 2: no message of messages is the assistant's"),
        ({"messages": []}, "line 2: no message of messages is the assistant's"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "line 2: message 1 is from bot; known are human"),
        ({"text": None}, "line 2: its field text is no text but NoneType"),
        ({"prompt": "p", "completion": 3}, "line 2: its field completion is no text but int"),
        ({"instruction": "i", "answer": "a"}, "line 2: no text in it; it has the fields instruction, answer"),
        (["text"], "line 2: it is no JSON object"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"calibration.source=.*a.jsonl, {message}"):
        documents(written(tmp_path / "a.jsonl", {"text": "fine"}, row), 1, seed=0)


def test_damaged_files_and_empty_ones(tmp_path: Path) -> None:
    for name, content, message in (
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: it is not JSON"),
        ("latin.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), "line 1: it is not UTF-8"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "latin.txt, line 1: it is not UTF-8"),
        ("empty.jsonl", b"\n", "empty.jsonl is empty"),
        ("empty.txt", b"", "empty.txt is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            documents(Calibration(source=str(tmp_path / name)), 1, seed=0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Data sets in folders, which the hub's library reads by the same function."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name: str, rows: list[Any]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"hub:{tmp_path / name}"

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub(hub: Any, tmp_path: Path, streaming: bool) -> None:
    source = hub("some", [{"text": f"number {i}"} for i in range(50)])
    drawn = [documents(Calibration(source=source, streaming=streaming), 7, seed) for seed in (0, 0, 1)]
    assert len({d.completion for d in drawn[0]}) == 7
    assert drawn[0] == drawn[1] != drawn[2]
    assert bool(list(tmp_path.glob("cache/**/*.arrow"))) != streaming  # kept only where it was downloaded
    assert len(documents(Calibration(source=source, streaming=streaming), 99, 0)) == 50


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_data_sets_of_the_hub(hub: Any, streaming: bool) -> None:
    for source, split, message in (
        (
            hub("untitled", [{"title": "x", "body": "y"}]),
            "train",
            "row 1: no text in it; it has the fields title, body",
        ),
        (hub("chats", [{"messages": [USER]}]), "train", "row 1: no message of messages is the assistant's"),
        (hub("small", [{"text": "a"}]), "trian", "calibration.split=trian"),
        (hub("nothing", []), "train", "is empty|cannot be read"),
        (f"hub:{Path(__file__).parent / 'nowhere'}", "train", "cannot be read.*check its name"),
    ):
        with pytest.raises(UserError, match=message):
            documents(Calibration(source=source, split=split, streaming=streaming), 1, seed=0)


def test_the_seed_decides_which_documents(tmp_path: Path) -> None:
    calibration = written(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100)))
    drawn = [documents(calibration, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_benchmarks_training_split_is_worded_as_the_benchmark_words_it() -> None:
    calibration = Calibration(source="gsm8k", data_dir=str(ITEMS))
    rows = [json.loads(line) for line in (ITEMS / "gsm8k" / "train.jsonl").open()]
    expected = [Document(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    assert sorted(documents(calibration, 10_000, seed=0), key=str) == sorted(expected, key=str)


def test_articles_come_in_pieces_that_a_document_can_hold() -> None:
    calibration = Calibration(source="wikitext", data_dir=str(ITEMS), max_length=50)
    found = documents(calibration, 10_000, seed=0)
    articles = [json.loads(line)["page"] for line in (ITEMS / "wikitext2" / "validation.jsonl").open()]
    assert all(isinstance(d, Document) and not d.prompt and len(d.completion) <= 200 for d in found)
    assert sum(len(d.completion) > 150 for d in found) > 0.9 * len(found)  # type: ignore[union-attr]
    words = sum(len(d.completion.split()) for d in found)  # type: ignore[union-attr]
    assert 0.8 * sum(len(a.split()) for a in articles) < words  # fewer, as the benchmark joins punctuation to words
    assert any("The Boat Race 2008" in d.completion for d in found)  # type: ignore[union-attr]
    assert "".join(_split_text("a  bb\nccccc d", 3)) == "abbcccccd" and list(_split_text("aaaa", 3)) == ["aaa", "a"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arc_easy", Document("Question: What causes sound?\nAnswer:", " vibrations")),
        (
            "hellaswag",
            Document(
                "Wrapping presents: We see a box on fabric. A person", " wraps the box in the fabric and ties it up."
            ),
        ),
        ("winogrande", Document("God liked to control the day and the night, but the day", " was too bright.")),
        ("piqa", Document("Question: laser\nAnswer:", " burns face")),
    ],
)
def test_choices_are_worded_with_the_right_one(name: str, expected: Document) -> None:
    from winnow.data.task_spec import Spec
    from winnow.data.tasks import load, quiet

    spec = Spec.read(name, dict(_benchmarks()[name][name]))
    with quiet():
        task = load(spec, str(ITEMS))[0][0].task
    assert expected in [document for doc in task.eval_docs for document in _item_documents(task, doc, 512)]


def test_a_benchmark_without_a_training_split_is_none() -> None:
    with pytest.raises(UserError, match=r"arc_easy: that benchmark has no training split here; take gsm8k, wikitext"):
        documents(Calibration(source="arc_easy", data_dir=str(ITEMS)), 1, seed=0)


@pytest.mark.parametrize(
    ("name", "file", "field"),
    [
        ("gsm8k", "gsm8k/test.jsonl", "question"),
        ("commonsense_qa", "commonsense_qa/validation.jsonl", "question"),
        ("truthfulqa", "truthful_qa/validation.jsonl", "question"),
        ("humaneval", "openai_humaneval/test.jsonl", "prompt"),
        ("bbh", "bbh/date_understanding.jsonl", "input"),
        ("arc_easy", "arc_easy/test.jsonl", "question"),
        ("winogrande", "winogrande/validation.jsonl", "sentence"),
        ("lambada", "lambada_openai/test.jsonl", "text"),
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


def test_test_items_are_found_in_every_form(tmp_path: Path) -> None:
    item = json.loads((ITEMS / "gsm8k/test.jsonl").open().readline())["question"]
    for number, row in enumerate(
        (
            {"messages": [*said("hi", "hello", item, "4")]},
            {"messages": [*said("Ask me one.", item)]},
            {"conversations": [{"from": "human", "value": item}, {"from": "gpt", "value": "4"}]},
            {"instruction": "Solve it.", "input": item, "output": "4"},
            {"instruction": item, "output": "4"},
            {"text": "fine", "meta": {"origin": [item]}},
        )
    ):
        with pytest.raises(UserError, match="line 1 is a test item of gsm8k"):
            documents(written(tmp_path / f"{number}.jsonl", row), 1, seed=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("openbookqa", "There is most likely going to be fog around: a marsh"),
        ("hellaswag", "A boy is running down a track. The boy lifts his body above the height of a pole."),
        ("hellaswag", "stands on his hands and springs."),
        ("winogrande", "The arrow stuck to the bark but not the stone because the stone was hard."),
        ("piqa", None),
        ("wikitext", None),
    ],
)
def test_test_items_without_a_question_of_their_own_are_refused(tmp_path: Path, name: str, text: str | None) -> None:
    """Also as the benchmark words them, with their answers."""
    if name == "wikitext":
        articles = [json.loads(line)["page"] for line in (ITEMS / "wikitext2" / "test.jsonl").open()]
        text = max((line for article in articles for line in article.split("\n")), key=len)
    if name == "piqa":
        text = (
            "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer: Provide the guinea pig with a cage "
            "full of a few inches of bedding made of ripped paper strips, you will also need to supply it with a water "
            "bottle and a food dish."
        )
    assert text
    for part in (text, text.splitlines()[-1]):
        with pytest.raises(UserError, match=f"line 1 is a test item of {name}"):
            documents(written(tmp_path / "a.jsonl", {"text": f"Some words.\n\n{part}\n"}), 1, seed=0)


def test_texts_that_are_nobodys_are_not_refused(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("cans", "Predators eat", " = = Credits and personnel = = ", "A man stands. he")]
    assert len(documents(written(tmp_path / "a.jsonl", *rows), 9, seed=0)) == 4


@pytest.mark.parametrize("file", ["gsm8k/train.jsonl", "wikitext2/validation.jsonl"])
def test_nothing_of_a_training_split_is_refused(file: str) -> None:
    for line in (ITEMS / file).open():
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
