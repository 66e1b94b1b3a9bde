"""Data files as people have them: what is harmless is read, and what is not is named by file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.benchmark.test_score import ITEMS, harness
from tests.test_conf import composed
from winnow import build
from winnow.benchmark import divergence
from winnow.core.errors import UserError
from winnow.core.types import Calibration, Document
from winnow.data import corpus
from winnow.data.calibration import calibration_batches
from winnow.data.corpus import documents
from winnow.data.local_items import read
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.runtime import serving

ROWS = [{"text": "Anna goes to the märket."}, {"text": "Tom takes a cup."}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)

READ: dict[str, tuple[str, bytes]] = {
    "plain": ("data.jsonl", LINES.encode()),
    "a byte order mark": ("data.jsonl", LINES.encode("utf-8-sig")),
    "UTF-16 of Windows": ("data.jsonl", LINES.encode("utf-16")),
    "Windows' ends of lines": ("data.jsonl", LINES.replace("\n", "\r\n").encode()),
    "no end of the last line": ("data.jsonl", LINES.strip().encode()),
    "empty lines": ("data.jsonl", LINES.replace("\n", "\n\n").encode()),
    "an array": ("data.json", json.dumps(ROWS).encode()),
    "an array named as rows": ("data.jsonl", json.dumps(ROWS, indent=1).encode()),
    "capitals": ("DATA.JSONL", LINES.encode()),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_alike_for_calibration_and_for_scoring(case: str, tmp_path: Path) -> None:
    name, content = READ[case]
    (tmp_path / name).write_bytes(content)
    found = documents(Calibration(str(tmp_path / name)), 5, seed=0)
    assert sorted(found, key=str) == sorted((Document("", row["text"]) for row in ROWS), key=str)
    assert read({"test": [str(tmp_path / name)]})["test"].to_list() == ROWS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.TXT").write_bytes("One.\r\n\r\nTwo.".encode("utf-8-sig"))
    assert {d.completion for d in documents(Calibration(str(tmp_path / "text.TXT")), 5, seed=0)} == {"One.", "Two."}  # type: ignore[union-attr]
    assert read({"test": [str(tmp_path / "text.TXT")]})["test"].to_list() == [{"text": "One.\n\nTwo."}]


REFUSED: dict[str, tuple[bytes, str]] = {
    "half a character": (LINES.encode() + b'{"text": "\\ud83d"}\n', r"line 3: \\ud83d is half of a character"),
    "half a character deep in a row": (b'{"text": "a", "more": [{"x": "\\udc00"}]}', r"line 1: \\udc00 is half"),
    "Latin-1": (LINES.encode() + '{"text": "naïve"}\n'.encode("latin-1"), "line 3: it is not UTF-8"),
    "no JSON": (LINES.encode() + b"{'text': 1}\n", "line 3: it is not JSON"),
    "no object": (b'"text"\n', "line 1: it is no JSON object"),
    "no object in an array": (b'[{"text": "a"}, 3]', "item 2: it is no JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_line(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^calibration\.source=.*data\.jsonl, {message}"):
        documents(Calibration(str(tmp_path / "data.jsonl")), 5, seed=0)
    with pytest.raises(UserError, match=rf"data\.jsonl, {message}"):
        read({"test": [str(tmp_path / "data.jsonl")]})


def test_a_field_of_two_types_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "a"}\n{"question": null}\n{"question": 3}\n')
    with pytest.raises(
        UserError, match=r"data\.jsonl, line 3: its field question is of type number, and str in .*line 1"
    ):
        read({"test": [str(tmp_path / "data.jsonl")]})


@pytest.mark.parametrize("rows", ['{"text": ""}\n{"text": "Tom."}\n', '{"text": "Tom."}\n{"text": ""}\n'])
def test_an_empty_row_is_left_out(rows: str, tiny: Path, run_in: Run, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(rows)
    run = Run(tmp_path, calibration=Calibration(str(tmp_path / "data.jsonl")))
    batches, _ = calibration_batches(pretrained(str(tiny)), run)
    assert [len(batch) for batch in batches] == [1]


def test_rows_without_any_text_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": ""}\n')
    run = Run(tmp_path, calibration=Calibration(str(tmp_path / "data.jsonl")))
    with pytest.raises(UserError, match=r"calibration\.source=.* is empty"):
        calibration_batches(pretrained(str(tiny)), run)


def test_the_default_calibration_suits_the_model(tiny: Path, tmp_path: Path) -> None:
    def source(*typed: str) -> str:
        return build.calibration(composed("compress", *typed)).source

    assert source("model=nano") == source("model=nano_untrained") == "nano"
    assert source("model=local", f"model.path={tiny}") == "nano"  # it knows these words and no others
    shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Paris"] = 1024
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert source("model=local", f"model.path={tmp_path / 'other'}") == corpus.GENERAL
    assert source("model=qwen2_5_7b") == corpus.GENERAL
    assert source("model=qwen2_5_7b", "calibration.source=gsm8k") == "gsm8k"


@pytest.mark.parametrize(
    ("data_dir", "way_out"),
    [
        (str(ITEMS), r"here is calibration\.source=gsm8k \(of .*gsm8k/train\.jsonl\) or .*wikitext"),
        (
            None,
            r"that is the default for models other than the embedded one; without the hub set calibration\.source to a \.jsonl",
        ),
    ],
)
def test_without_the_hub_local_files_are_named(
    data_dir: str | None, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=rf"calibration\.source={corpus.GENERAL} cannot be read .*; {way_out}"):
        documents(Calibration(corpus.GENERAL, data_dir=data_dir), 5, seed=0)


@pytest.fixture
def short(tiny: Path, tmp_path: Path) -> Path:
    """A model of 64 learned positions: what lies beyond them is an IndexError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    pretrained(str(tiny)).tokenizer.save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_rows_are_cut_to_what_the_model_can_read(short: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "Tom takes a cup. " * 100}) + "\n")
    run = Run(tmp_path, calibration=Calibration(str(tmp_path / "data.jsonl")))
    lm = pretrained(str(short))
    batches, _ = calibration_batches(lm, run)
    assert batches[0].shape == (1, 64)
    with serving(lm) as served:
        found = divergence.divergence(served, divergence.reference(lm, served, run, "cpu"))
    assert found["kl_to_base"] == pytest.approx(0, abs=1e-4) and found["top1_agreement"] == 1


def test_texts_that_are_all_too_long_give_no_divergence(short: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, calibration=Calibration(max_length=64))
    lm = pretrained(str(short))
    with serving(lm) as served:
        wanted = divergence.reference(lm, served, run, "cpu")
        served.context = 2
        with pytest.raises(NotImplementedError, match="longer than what the model can read"):
            divergence.divergence(served, wanted)


@pytest.mark.parametrize(("score_holdout", "way_out"), [(True, "raise confirm"), (False, "lower confirm")])
def test_a_hold_out_that_leaves_no_item_is_refused(score_holdout: bool, way_out: str) -> None:
    share = 1e-9 if score_holdout else 1 - 1e-9
    made = harness("arc_easy", data_dir=ITEMS, holdout_share=share, score_holdout=score_holdout)
    with pytest.raises(UserError, match=f"arc_easy has so few items that none is left.*{way_out}, or set confirm=0"):
        made.load_items()
