"""Proposes strategies with a language model, which an optimizer advises and replaces wherever the model fails.

python search.py agent=gpt4o budget.usd=2
python search.py agent=local_llm agent.llm.base_url=http://localhost:8000/v1
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from winnow.agent.llm import providers
from winnow.agent.llm.brief import as_text, brief
from winnow.agent.llm.chat import STRUCTURED, Chat, Dead, Transcript
from winnow.agent.llm.graph import Graph, Session
from winnow.core.errors import UserError
from winnow.study.budget import Budget
from winnow.study.history import History
from winnow.study.policy import Forecaster, Policy, Suggestion
from winnow.study.space import Space

logger = logging.getLogger(__name__)

DEAD_IN_A_ROW = 3  # proposals without an answer before the search stops asking the model


@dataclass
class LLM:
    """Asks a language model for the next strategy.

    Attributes:
        llm: creates the chat model; everything but its key and limits is already bound.
        optimizer: makes the suggestion that the model sees, and that is used if the model has none.
        fallback: steers if there is no key, and after the search stops asking the model; None: a missing key is an error,
            and the optimizer takes over.
        structured: how the model is asked for JSON, see `Chat`.
        proposals: proposals per answer; the first that can be tried is used.
        max_repairs: how often the model is asked again after objections.
        attempts, timeout_s, longest_wait_s: limits of each call, see `Chat`.
        key_variable: environment variable with the key; None means the usual one of the provider.
        prices: USD per million tokens by model, each with `input` and `output`.
        budget: limits of the search, see `Budget`.
        about: names of the model, benchmark and hardware, for the brief.
    """

    llm: Callable[..., Any]
    optimizer: Policy
    fallback: Policy | None = None
    structured: str = "function_calling"
    proposals: int = 3
    max_repairs: int = 2
    attempts: int = 4
    timeout_s: float = 60.0
    longest_wait_s: float = 60.0
    key_variable: str | None = None
    prices: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    chat: Chat = field(init=False, repr=False)
    _silent: str = field(default="", init=False, repr=False)  # why the search no longer asks the model
    _dead: int = field(default=0, init=False, repr=False)  # proposals in a row without an answer

    def __post_init__(self) -> None:
        """Checks all settings, before any work.

        Raises:
            UserError: a setting is wrong (the message names it), or there is no key and no fallback.
        """
        if self.structured not in STRUCTURED:
            raise UserError(f"agent.structured={self.structured} is not known; it is one of {', '.join(STRUCTURED)}")
        for name, least in (("proposals", 1), ("max_repairs", 0), ("attempts", 1), ("timeout_s", 0.01)):
            if getattr(self, name) < least:
                raise UserError(f"agent.{name}={getattr(self, name)} is too small; give at least {least}")
        self._limits = Budget(**self.budget)
        provider = providers.provider_of(self.llm)
        settings = dict(getattr(self.llm, "keywords", {}))
        providers.check_settings(settings)
        settings = {name: value for name, value in settings.items() if value is not None}
        model = str(settings.pop("model", ""))
        base_url = str(settings.get("base_url", ""))
        if not model and not base_url:
            raise UserError("agent.llm.model is not set; name the model, e.g. agent.llm.model=gpt-4o")
        self._price = self.prices.get(model)
        if self._price is not None and not all(
            isinstance(self._price.get(s), int | float) for s in ("input", "output")
        ):
            raise UserError(f"agent.prices of {model} must have input and output, in USD per million tokens")
        if self._price is None and self._limits.usd is not None:
            raise UserError(
                f"budget.usd={self._limits.usd:g} cannot be kept: the price of {model or 'the model'} is not known; set "
                f"'agent.prices={{{model or 'MODEL'}: {{input: USD, output: USD}}}}' per million tokens, or budget.tokens"
            )
        key = providers.NO_KEY
        try:
            key, self._variable = providers.key_of(provider, self.key_variable, base_url)
        except UserError as error:
            if self.fallback is None:
                raise
            self._silent = str(error).partition(":")[0]
        make = getattr(self.llm, "func", self.llm)
        self.chat = Chat(
            lambda **arguments: make(**settings, max_retries=provider.once, **arguments),
            model,
            key,
            structured=self.structured,
            attempts=self.attempts,
            timeout_s=self.timeout_s,
            longest_wait_s=self.longest_wait_s,
            rng=random.Random(self.seed),
        )
        self._graph = Graph(self.chat, self.proposals, self.max_repairs)
        if self._silent:
            logger.info(f"search: no language model steers ({self._silent}): agent.fallback does")

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the model's proposal, or another suggestion in its place.

        Raises:
            Exhausted: every strategy was tried.
        """
        spent = self._limits.llm_budget_spent(history)
        if spent and not self._silent:
            self._give_up(spent)
        steering = self.fallback if self._silent and self.fallback is not None else self.optimizer
        instead = steering.ask(history, space, forecaster)
        if self._silent:
            return self._without(instead, {"fallback": self._silent})
        contents = brief(history, space, instead, self._limits.remaining(history), self.about)
        text = str(self.chat.scrub(as_text(contents)))
        session = Session(text, history, space, forecaster, Transcript(self._price))
        failure = self._run(session)
        record = self._record(session, instead)
        messages = {
            "brief": text,
            "brief_sha256": record["brief_sha256"],
            "calls": self.chat.scrub(session.transcript.calls),
        }
        idea = session.idea
        if idea is None:
            return self._without(instead, {**record, "fallback": failure}, messages)
        record |= {"confidence": idea.confidence, "routed": session.why}
        return Suggestion(idea.strategy, "llm", str(self.chat.scrub(idea.reason)), record=record, messages=messages)

    def _run(self, session: Session) -> str:
        """Asks the model; returns why there is no proposal, "" if there is one."""
        try:
            self._graph.run(session)
        except Dead as dead:
            self._dead += 1
            message = str(dead)
            if dead.final:
                self._give_up(f"{self._model_name()}: {message}; check {self._variable} and agent.llm")
            elif self._dead >= DEAD_IN_A_ROW:
                self._give_up(
                    f"{self._model_name()} has not answered for {self._dead} proposals in a row; last: {message}"
                )
            else:
                logger.info(f"search: {self._model_name()} does not answer ({message}); the optimizer proposes instead")
            return message
        self._dead = 0
        if session.idea is None:
            last = session.objections[0] if session.objections else "no proposal"
            return f"nothing that {self._model_name()} proposed can be tried: {last}"
        return ""

    def _record(self, session: Session, instead: Suggestion) -> dict[str, Any]:
        """Returns what the study stores of the conversation."""
        transcript = session.transcript
        return {
            "agent": "llm",
            "model": self.chat.name,
            "specialist": session.specialist.name if session.specialist else None,
            "brief_sha256": hashlib.sha256(session.brief.encode()).hexdigest(),
            "instead": list(instead.strategy.overrides),
            "tokens": {**transcript.tokens, **({"estimated": True} if transcript.estimated else {})},
            "usd": transcript.usd,
            "repairs": session.repairs,
        }

    def _without(
        self, instead: Suggestion, record: Mapping[str, Any], messages: Mapping[str, Any] | None = None
    ) -> Suggestion:
        """Returns the other suggestion, with a record of why it replaces the model's."""
        return Suggestion(
            instead.strategy,
            instead.by,
            instead.why,
            instead.expected_gain,
            {**instead.record, "agent": "llm", **record},
            messages or {},
        )

    def _give_up(self, why: str) -> None:
        """Stops asking the model for the rest of the search."""
        self._silent = why
        other = "agent.fallback" if self.fallback is not None else "the optimizer"
        logger.info(f"search: the language model is not asked any more: {why}; {other} steers on")

    def _model_name(self) -> str:
        return self.chat.name or "the model"
