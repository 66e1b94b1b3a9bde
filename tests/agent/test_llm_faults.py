"""Every fault that the language model's endpoint may have: waited for, tried again, or left, and the search goes on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest

from tests.agent.endpoint import Cut, Endpoint, Fault, Hang
from tests.agent.steered import DATE, GOOD, GOOD_STRATEGY, KEY, Steered
from winnow.agent.llm.chat import retry_after
from winnow.agent.llm.steering import DEAD_IN_A_ROW
from winnow.agent.samplers import Grid

pytest.importorskip("langchain_openai", reason="pip install 'winnow[agent]'")
pytest.importorskip("langgraph", reason="pip install 'winnow[agent]'")
pytestmark = pytest.mark.usefixtures("key")


@pytest.mark.parametrize("fault", [Fault(500), Fault(502, "<html>bad gateway</html>"), Fault(503), Fault(429), Cut()])
def test_what_may_pass_is_tried_again_after_growing_waits(fault: Any) -> None:
    with Endpoint(fault, fault, GOOD) as endpoint:
        steered = Steered(endpoint.url)
        assert steered.ask().strategy == GOOD_STRATEGY
        assert endpoint.proposals == 3
    first, second = steered.waits
    assert 0.5 <= first <= 1.0 <= second <= 2.0


def test_jitter_differs_from_one_search_to_another() -> None:
    with Endpoint(Fault(500), GOOD) as endpoint:
        waits = []
        for seed in (1, 2):
            endpoint.proposals = 0
            steered = Steered(endpoint.url, seed=seed)
            steered.ask()
            waits += steered.waits
    assert waits[0] != waits[1]


@pytest.mark.parametrize(
    ("value", "wait"), [("7", 7.0), (format_datetime(datetime(2031, 5, 4, 12, 0, 30, tzinfo=UTC)), 30.0)]
)
def test_the_endpoints_own_wait_is_kept(value: str, wait: float) -> None:
    with Endpoint(Fault(429, headers={"Retry-After": value}), GOOD) as endpoint:
        steered = Steered(endpoint.url)
        assert steered.ask().strategy == GOOD_STRATEGY
    assert steered.waits == [wait]


@pytest.mark.parametrize(
    ("value", "seconds"), [("-3", 0.0), ("soon", None), ("nan", None), ("Sun, 04 May 2031 11:00:00 GMT", 0.0)]
)
def test_odd_waits(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}, DATE.timestamp()) == seconds


def test_nobody_waits_for_an_hour() -> None:
    with Endpoint(Fault(429, headers={"Retry-After": "3600"})) as endpoint:
        steered = Steered(endpoint.url)
        found = steered.ask()
        assert endpoint.proposals == 1
    assert (found.by, steered.waits) == ("random", [])
    assert "asks to wait for 3600 s" in found.record["fallback"]


def test_a_silent_endpoint_is_left_after_its_time() -> None:
    with Endpoint(Hang(), route=Hang()) as endpoint:
        steered = Steered(endpoint.url, timeout_s=1.0, attempts=2)
        found = steered.ask()
    assert (found.by, len(steered.waits)) == ("random", 1)
    assert "Timeout" in found.record["fallback"] and "2 times" in found.record["fallback"]


FINAL = {
    "401": (Fault(401, f'{{"error": {{"message": "Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}}}'), "the key is refused"),
    "403": (Fault(403), "access is refused"),
    "404": (Fault(404, '{"error": {"message": "The model `scripted` does not exist", "code": "model_not_found"}}'), "no such model"),
    "no quota": (Fault(429, '{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'), "quota"),
}  # fmt: skip


@pytest.mark.parametrize("name", FINAL)
def test_what_will_not_pass_ends_the_models_part_with_one_line(name: str, log_lines: list[str]) -> None:
    fault, words = FINAL[name]
    with Endpoint(fault) as endpoint:
        steered = Steered(endpoint.url)
        found = [steered.ask() for _ in range(3)]
        assert (endpoint.proposals, len(endpoint.requests)) == (1, 2)
    assert [s.by for s in found] == ["random"] * 3
    assert all(words in s.record["fallback"] for s in found)
    (line,) = log_lines
    assert words in line and "OPENAI_API_KEY" in line and "the optimizer steers on" in line
    assert KEY not in line + json.dumps([[s.record, s.messages] for s in found])


def test_an_endpoint_that_stays_dead_is_not_asked_for_ever(log_lines: list[str]) -> None:
    with Endpoint(Fault(500), route=Fault(500)) as endpoint:
        steered = Steered(endpoint.url, attempts=2, fallback=Grid())
        found = [steered.ask() for _ in range(DEAD_IN_A_ROW + 2)]
        assert len(endpoint.requests) == 2 * DEAD_IN_A_ROW
    assert [s.by for s in found] == ["random"] * DEAD_IN_A_ROW + ["grid"] * 2
    assert "agent.fallback steers on" in log_lines[-1]


def test_an_endpoint_that_comes_back_is_asked_again() -> None:
    faults = [Fault(400)] * (DEAD_IN_A_ROW - 1)
    with Endpoint(*faults, GOOD, *faults, GOOD) as endpoint:
        steered = Steered(endpoint.url)
        found = [steered.ask().by for _ in range(2 * DEAD_IN_A_ROW)]
    assert found == (["random"] * (DEAD_IN_A_ROW - 1) + ["llm"]) * 2
