"""A person between the agent and the search: accepts, edits, rejects, ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.agent.histories import outlook, rtn, space_of, started
from winnow.agent.interactive import MOST_REJECTED, Interactive, check_terminal, edit
from winnow.agent.samplers import Grid
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.policy import Exhausted, Suggestion

DEFAULTS: Mapping[str, Any] = {"method.rtn.bits": 4, "method.rtn.group_size": 64, "method.wanda.pattern": "2:4"}


def asked(*answers: str, policy: Any = None, history: Any = None) -> tuple[Suggestion, list[str]]:
    left, shown = list(answers), list[str]()

    def read(question: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    found = Interactive(policy or Grid(), DEFAULTS.get, read, shown.append)
    try:
        return found.ask(history or started(), space_of("rtn", "wanda"), outlook()), shown
    finally:
        assert not left, "it stopped asking too early"


def first(count: int) -> list[Strategy]:
    """What the grid proposes, if each is rejected."""
    history, found = started(), []
    for _ in range(count):
        found.append(Grid().ask(history, space_of("rtn", "wanda"), outlook()).strategy)
        history.proposed.add(found[-1].overrides)
    return found


def test_accepted_is_as_proposed() -> None:
    found, shown = asked("a")
    assert (found.strategy, found.by) == (first(1)[0], "grid")
    assert "next on the grid" in shown[0] and str(found.strategy) in shown[0]


def test_a_rejected_one_is_not_proposed_again_and_is_written_down() -> None:
    found, _ = asked("x", "r", "reject", "a")
    one, two, three = first(3)
    assert found.strategy == three
    assert found.record["rejected"] == [list(one.overrides), list(two.overrides)]


def test_after_five_rejections_the_search_ends() -> None:
    with pytest.raises(Exhausted, match="5 proposals in a row"):
        asked(*["r"] * MOST_REJECTED)


@pytest.mark.parametrize("answers", [["q"], ["r", "quit"], []])
def test_quitting_ends_the_search(answers: list[str]) -> None:
    with pytest.raises(Exhausted, match="ended by its user"):
        asked(*answers)


def test_an_edit_is_checked_and_said_to_be_the_persons() -> None:
    found, shown = asked("e", "method=[rtn] method.rtn.bits=5", "method=[rtn] method.rtn.bits=3")
    assert (found.strategy, found.by) == (rtn(3, 32), "user")  # of what was proposed the rest stays
    assert found.record["edited_from"] == list(first(1)[0].overrides)
    assert "must be one of 2, 3, 4, 8" in "\n".join(shown)


def test_what_a_rejected_proposal_took_counts() -> None:
    class Dear(Grid):
        def ask(self, *arguments: Any) -> Suggestion:
            found = super().ask(*arguments)
            record = {"tokens": {"input": 10, "output": 1}, "usd": 0.25}
            return Suggestion(found.strategy, "llm", record=record, messages={"brief": found.strategy.methods})

    found, _ = asked("r", "a", policy=Dear())
    assert (found.record["tokens"], found.record["usd"]) == ({"input": 20, "output": 2}, 0.5)
    assert len(found.messages["rejected"]) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hydra.run.dir=/tmp", "only methods and their knobs"),
        ("budget.trials=9", "only methods and their knobs"),
        ("model.path=/etc", "only methods and their knobs"),
        ("+method.rtn.x=1", "give one value"),
        ("method.rtn.bits=choice(3,4)", "give one value"),
        ("method.rtn._target_=os.system", "no knob"),
        ("method.rtn.bits=9", "must be one of"),
        ("method=[rtn,wanda]", "must come before"),
        ("method=[quantum]", "no method"),
        ("method.wanda.pattern=2:4", "name it in method"),
        ("method.rtn.bits=(", "method.rtn.bits"),
        ("method.rtn.bits='", ""),
    ],
)
def test_edits_stay_in_the_space(line: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        edit(rtn(4), line, space_of("rtn", "wanda"), DEFAULTS.get)
    assert words in str(error.value)


def test_an_edit_changes_only_what_it_names() -> None:
    space = space_of("rtn", "wanda")
    assert edit(rtn(4, 32), "method.rtn.bits=3", space, DEFAULTS.get) == rtn(3, 32)
    both = edit(rtn(4, 32), "method=[wanda,rtn]", space, DEFAULTS.get)
    assert both == Strategy(("wanda", "rtn"), {"method.wanda.pattern": "2:4", **rtn(4, 32).knobs})
    assert edit(both, "method=[rtn]", space, DEFAULTS.get) == rtn(4, 32)


def test_without_a_terminal_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="interactive=true needs a terminal"):
        check_terminal()
