"""The report is one file that opens anywhere, says everything, and runs nothing that a trial said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from winnow.core.errors import Reason
from winnow.core.types import Strategy, Summary, Trial
from winnow.report.html import render, write_report


class Page(HTMLParser):
    """What a browser makes of the file: elements with their attributes, texts, and the contents of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.codes: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        {"script": self.scripts, "style": self.styles, "code": self.codes}.get(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[inside][-1] += data
            return
        if "code" in self._open:
            self.codes[-1] += data
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    @property
    def data(self) -> dict:
        (text,) = (s for s in self.scripts if s.startswith("{"))
        return json.loads(text)


@pytest.fixture
def page(summary: Summary) -> Page:
    return Page(render(summary))


def test_it_loads_nothing_from_anywhere(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert not re.match(r"\s*(https?:)?//", attributes.get(name) or ""), f"<{tag} {name}> is external"
    assert not re.search(r"@import|url\(", " ".join(page.styles))
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", " ".join(page.scripts[2:]))
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy and "default-src 'none'" in policy
    assert "http" not in policy


def test_only_its_own_scripts_may_run(page: Page) -> None:
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    programs = [s for s in page.scripts if not s.startswith("{")]
    assert len(programs) == 3
    for program in programs:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()}'" in (policy or "")
    assert "script-src 'unsafe-inline'" not in (policy or "")


def test_what_trials_say_is_text(page: Page, summary: Summary) -> None:
    assert not [tag for tag, _ in page.elements if tag in ("img", "b", "study")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    hostile = page.data["trials"][4]["strategy"]
    assert hostile.startswith("</script><img src=x onerror=")  # back as it was from JSON
    assert page.data["study"] == summary.name
    assert "\x1b" not in render(summary)


def test_every_trial_is_there_with_its_command_lines(page: Page, summary: Summary) -> None:
    ids = {attributes.get("id") for _, attributes in page.elements}
    for trial in summary.trials:
        assert f"trial-{trial.number}" in ids
        for command in trial.commands:
            assert command in page.codes, f"not to be copied as it is: {command}"
    copies = [a for tag, a in page.elements if tag == "button" and a.get("class") == "copy"]
    assert len(copies) == sum(len(trial.commands) for trial in summary.trials)


def test_failed_trials_say_why(page: Page) -> None:
    assert "timeout" in page.text
    assert "longer than 60 s" in page.text
    assert "Traceback:" in page.text
    assert "2 failed: 1 error, 1 timeout" in page.text


def test_front_base_and_sources_are_marked(page: Page) -> None:
    classes = {a["id"]: (a.get("class") or "").split() for tag, a in page.elements if tag == "tr" and a.get("id")}
    assert {name for name, kinds in classes.items() if "front" in kinds} == {"trial-0", "trial-1", "trial-2"}
    assert {name for name, kinds in classes.items() if "failed" in kinds} == {"trial-4", "trial-5"}
    assert "base" in classes["trial-0"]
    assert "estimated" in page.text
    assert "counter" in page.text


def test_disturbed_figures_are_marked_and_explained(summary: Summary) -> None:
    sources = {"latency_ms": "measured, in turn with the base model, disturbed", "size_bytes": "estimated, disturbed"}
    trials = (replace(summary.trials[0], sources=sources), *summary.trials[1:])
    page = render(replace(summary, trials=trials))
    marked = re.findall(r'<abbr class="source" title="([^"]*)">([^<]*)</abbr>', page)
    assert [short for _, short in marked][:3] == ["est.", "disturbed", "disturbed"]
    assert all("the front does not rest on it" in title for title, short in marked if short == "disturbed")
    assert "one marked <q>disturbed</q> was measured beside other work" in page


def test_headline_units_and_directions(page: Page) -> None:
    assert "3 strategies on the front" in page.text
    assert "2.88 MB, 0.32 of its size, accuracy 0.936 against 0.950" in page.text
    assert "accuracy: higher is better; size, latency: lower is better" in page.text
    assert "400 µWh" in page.text
    assert "6f1c" in page.text  # the fingerprint


def test_charts_draw_what_the_study_holds(page: Page) -> None:
    trials = page.data["trials"]
    assert trials[1]["values"]["size_bytes"] == pytest.approx(2.88)
    assert trials[1]["text"]["size_bytes"] == "2.88 MB"
    assert trials[4]["values"] == {}
    assert page.data["hypervolume"] == [0.1, 0.4, 0.5, 0.5, 0.5, None]
    assert [a["name"] for a in page.data["axes"]][:3] == ["accuracy", "size_bytes", "latency_ms"]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_study_that_has_just_begun(summary: Summary, kept: int) -> None:
    page = Page(render(replace(summary, trials=summary.trials[:kept], front=tuple(range(kept)), hypervolume=())))
    assert len(page.data["trials"]) == kept


def test_a_base_model_that_failed(summary: Summary) -> None:
    failed = Trial(0, Strategy(), reason=Reason.OUT_OF_MEMORY, message="")
    page = Page(render(replace(summary, trials=(failed, *summary.trials[1:]), front=(1, 2))))
    assert "nothing is relative to it" in page.text


def test_a_failed_write_leaves_the_old_report(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study" / "report.html"
    write_report(path, summary)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, summary)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
