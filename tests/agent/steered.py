"""A search steered by a language model at a scripted endpoint, as the tests of its answers and of its faults share it."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import Any

from tests.agent.endpoint import propose
from tests.agent.histories import outlook, rtn, space_of, started
from winnow.agent.llm.steering import LLM
from winnow.agent.samplers import Random
from winnow.core.types import Strategy
from winnow.study.policy import Suggestion

KEY = "sk-scripted-0123456789abcdef"
GOOD = propose({"rtn": {"bits": 3, "group_size": 32}})
GOOD_STRATEGY = rtn(3, 32)
DATE = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)


class Steered:
    """A policy at an endpoint, with how long it would have waited."""

    def __init__(self, url: str, **settings: Any) -> None:
        from langchain_openai import ChatOpenAI

        self.waits: list[float] = []
        llm = functools.partial(ChatOpenAI, model="scripted", base_url=url)
        given = {"llm": llm, "optimizer": Random(seed=1), "timeout_s": 20.0, **settings}
        self.policy = LLM(**given)
        self.policy.chat.sleep = self.waits.append
        self.policy.chat.clock = lambda: DATE.timestamp()
        self.history = started(rtn(4), rtn(8))
        self.space, self.outlook = space_of(), outlook()

    def ask(self) -> Suggestion:
        suggestion = self.policy.ask(self.history, self.space, self.outlook)
        assert isinstance(suggestion.strategy, Strategy)
        assert in_space(suggestion.strategy, self.space)
        return suggestion


def in_space(strategy: Strategy, space: Any) -> bool:
    """By the space itself, not by the critic: drawing its parameters gives the strategy again."""
    from winnow.study.space import distributions

    parameters, known = space.parameters(strategy), distributions(space)
    if not set(parameters) <= set(known):
        return False
    if not all(known[k]._contains(known[k].to_internal_repr(v)) for k, v in parameters.items()):
        return False
    return bool(space.draw(Fixed(parameters)) == strategy)


class Fixed:
    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.parameters[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.parameters[name]

    suggest_int = suggest_float
