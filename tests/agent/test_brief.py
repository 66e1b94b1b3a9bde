"""The brief, the schema and the critic: bounded, deterministic, and in agreement with the space."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.agent.histories import OBJECTIVES, add, outlook, random_history, rtn, space_of, started
from tests.agent.steered import in_space
from winnow.agent.llm.brief import adding, as_text, brief, gaps, knobs
from winnow.agent.llm.critic import clean, judge
from winnow.agent.llm.schema import as_proposal, proposals_schema, variants
from winnow.agent.llm.specialists import of_space, specialists
from winnow.core.errors import Reason
from winnow.core.types import Slot, Strategy
from winnow.study.history import History
from winnow.study.policy import Suggestion

SUGGESTION = Suggestion(rtn(2), "gp", expected_gain=0.0123456)


def test_a_brief_is_the_same_for_the_same_history_and_bounded_for_any() -> None:
    space = space_of()
    texts = [as_text(brief(random_history(space, 300), space, SUGGESTION, {"trials": 5})) for _ in range(2)]
    assert texts[0] == texts[1]
    large = as_text(brief(random_history(space, 10_000), space, SUGGESTION, {"trials": 5}))
    assert max(len(texts[0]), len(large)) < 20_000
    told = json.loads(large)
    assert len(told["front"]) <= 16 and told["suggestion"]["expected_gain"] == 0.01235
    assert told["trials"]["failed"] == sum(1 for n in range(1, 10_000) if n % 7 == 0)


def test_gaps_are_the_widest_stretches_of_the_front() -> None:
    history = History(OBJECTIVES)
    for bits, (accuracy, size) in zip((2, 3, 4, 8), [(0.5, 100), (0.6, 200), (0.9, 300), (1.0, 1000)], strict=True):
        add(history, rtn(bits), {"accuracy": accuracy, "size_bytes": float(size)})
    add(history, Strategy(("nf4",)), {"accuracy": 0.1, "size_bytes": 2000.0})  # dominated
    found = {(g["objective"], g["from"], g["to"]): g for g in gaps(history)}
    assert found["accuracy", 0.6, 0.9]["share_of_range"] == pytest.approx(0.6)
    assert found["accuracy", 0.6, 0.9]["between_trials"] == [1, 2]
    assert found["size_bytes", 300.0, 1000.0]["share_of_range"] == pytest.approx(0.7778)


def test_a_knobs_effect_is_over_pairs_that_differ_in_nothing_else() -> None:
    history = History(OBJECTIVES)
    for bits, group, accuracy in [(3, 32, 0.5), (4, 32, 0.7), (3, 64, 0.4), (4, 64, 0.5), (8, 128, 0.9)]:
        add(history, rtn(bits, group), {"accuracy": accuracy, "size_bytes": 100.0 * bits})
    rows = {(r["knob"], r["from"], r["to"]): r for r in knobs(history, history.trials, space_of())}
    step = rows["method.rtn.bits", 3, 4]
    assert step["pairs"] == 2
    assert step["mean_change"] == {"accuracy": pytest.approx(0.15), "size_bytes": 100.0}
    assert rows["method.rtn.group_size", 32, 64]["mean_change"]["accuracy"] == pytest.approx(-0.15)
    assert not any(row[2] in (8, 128) for row in rows)


def test_what_a_method_adds_is_over_pairs_with_and_without_it() -> None:
    history = started(rtn(4))
    pruned = Strategy(("wanda", "rtn"), {"method.wanda.pattern": "2:4", **rtn(4).knobs})
    add(history, pruned, {"accuracy": 0.6, "size_bytes": 850.0})
    rows = {r["method"]: r for r in adding(history, history.trials, ["wanda", "rtn", "nf4"])}
    assert rows["wanda"]["mean_change"] == {"accuracy": pytest.approx(-0.2), "size_bytes": -50.0}
    assert rows["rtn"]["mean_change"] == {"accuracy": pytest.approx(-0.1), "size_bytes": -100.0}  # to the base model
    assert set(rows) == {"wanda", "rtn"}


def test_failures_are_told_with_their_number() -> None:
    history = started()
    for bits in (2, 3):
        add(history, rtn(bits), {}, reason=Reason.OUT_OF_MEMORY, message=f"held {bits} GiB")
    add(history, Strategy(("nf4",)), {}, reason=Reason.INFEASIBLE, message="no device for it")
    told = brief(history, space_of(), SUGGESTION, {})["untrusted"]["failures"]
    assert [(f["reason"], f["times"], f["last_message"]) for f in told] == [
        ("out_of_memory", 2, "held 3 GiB"),
        ("infeasible", 1, "no device for it"),
    ]


def valid(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value keeps to a schema, for the words of JSON schema that ours uses."""
    if "anyOf" in schema:
        return any(valid(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(value) == set(schema["required"]) == set(schema["properties"])
            and all(valid(schema["properties"][k], v) for k, v in value.items())
        )
    if kind == "array":
        return isinstance(value, list) and all(valid(schema["items"], v) for v in value)
    if kind == "string":
        return isinstance(value, str)
    is_number = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    return is_number and schema["minimum"] <= value <= schema["maximum"]


def test_schema_critic_and_space_agree() -> None:
    space = space_of()
    schema, history = proposals_schema(space, 1), History(OBJECTIVES)
    every = list(space.all(2))
    for strategy in every[1:]:
        answer = {"proposals": [{"reason": "x", "confidence": 0.5, **as_proposal(strategy)}]}
        assert valid(schema, answer), strategy
        verdict = judge(answer, 1, history, space, outlook())
        assert verdict.idea is not None, verdict.objections
        assert verdict.idea.strategy == strategy
    assert len(variants(space.method("wanda"))) == 2
    assert not valid(schema, {"proposals": [{"reason": "x", "confidence": 0.5, **as_proposal(rtn(5))}]})


NASTY = (
    None,
    True,
    -1,
    0,
    3,
    1e308,
    10**400,
    "3",
    "",
    "x=1",
    "${oc.env:HOME}",
    "../x",
    "_target_",
    [],
    {},
    [3],
    {"a": 1},
    "rtn",
    "2:4",
)


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with something in it changed, removed, added or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        found, key = dict(value), rng.choice(list(value))
        what = rng.random()
        if what < 0.7:
            found[key] = mutated(value[key], rng)
        elif what < 0.8:
            del found[key]
        else:
            found[rng.choice(["_target_", "hydra.run.dir", "budget", "output", "bits", "seed", "method.rtn.bits"])] = (
                rng.choice(NASTY)
            )
        return found
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(value[place], rng), *value[place + (rng.random() < 0.8) :]]
    return rng.choice(NASTY)


def test_nothing_outside_the_space_ever_comes_out() -> None:
    space, history, rng = space_of(), started(rtn(4)), random.Random(7)
    every = list(space.all(3))
    accepted = 0
    for _ in range(4000):
        answer: Any = {
            "proposals": [
                {"reason": "x", "confidence": 0.5, **as_proposal(rng.choice(every))} for _ in range(rng.randint(1, 3))
            ]
        }
        for _ in range(rng.randint(1, 4)):
            answer = mutated(answer, rng)
        verdict = judge(answer, 3, history, space, outlook())
        assert (verdict.idea is None) <= bool(verdict.objections)
        assert all(len(o) < 600 and "\n" not in o for o in verdict.objections)
        if verdict.idea is not None:
            accepted += 1
            assert in_space(verdict.idea.strategy, space)
            assert verdict.idea.strategy.overrides not in history.proposed
            assert all(o.startswith("method") for o in verdict.idea.strategy.overrides)
    assert 100 < accepted < 3900  # the mutations do both: leave some intact, and break most


def test_clean_text_is_one_printable_line() -> None:
    assert clean("a\x1b[31m\n\tb\u202e  c\x00", 50) == "a [31m b c"
    assert clean("x" * 99, 10) == "xxxxxxx..."


def test_every_slot_has_a_specialist_and_only_those_of_the_space_are_asked() -> None:
    assert {slot for s in specialists() for slot in s.slots} == set(Slot)
    assert all(s.about and s.prompt for s in specialists())
    assert [s.name for s in of_space(space_of("rtn", "kv"))] == ["cache_and_runtime", "quantization"]
