"""Lets a person decide: each proposal is shown with its reason, and accepted, edited or rejected before it runs.

python search.py agent=llm interactive=true
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from winnow.agent.llm.critic import clean, objections_to, strategy_of
from winnow.agent.llm.schema import as_proposal
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Policy, Suggestion
from winnow.study.space import Space

MOST_REJECTED = 5  # proposals in a row, for one trial
QUESTION = "[a]ccept, [e]dit, [r]eject, [q]uit? "
EDIT = "overrides, e.g. method=[wanda,rtn] method.rtn.bits=3 (empty: back): "


def check_terminal() -> None:
    """Raises UserError if there is no terminal to answer in."""
    if not sys.stdin.isatty():
        raise UserError("interactive=true needs a terminal to ask in; leave it out, or run search.py in one")


def print_to_terminal(text: str) -> None:
    """Prints a text to standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Interactive:
    """Puts every proposal of a policy to a person.

    Attributes:
        policy: makes the proposals.
        configured: returns the configured value of a knob by its full key, for methods that an edit adds.
        read: asks the person a question and returns the answer.
        show: shows the person a text.
    """

    policy: Policy
    configured: Callable[[str], Any] = lambda key: None
    read: Callable[[str], str] = input
    show: Callable[[str], None] = print_to_terminal
    _rejected: list[Strategy] = field(default_factory=list, init=False, repr=False)

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the suggestion that the person has accepted.

        Raises:
            Exhausted: the person ends the search, or rejects everything.
        """
        earlier = {tuple(overrides) for trial in history.trials for overrides in trial.decision.get("rejected", ())}
        rejected: list[Suggestion] = []
        while len(rejected) < MOST_REJECTED:
            suggestion = self.policy.ask(self._without_rejected(history, earlier), space, forecaster)
            self._show(suggestion)
            accepted = self._decision(suggestion, history, space, forecaster)
            if accepted is not None:
                return _with_rejected(accepted, rejected)
            rejected.append(suggestion)
            self._rejected.append(suggestion.strategy)
        raise Exhausted(f"{MOST_REJECTED} proposals in a row were rejected; the same command goes on")

    def _without_rejected(self, history: History, earlier: set[tuple[str, ...]]) -> History:
        """Returns the history for the policy: rejected strategies count as proposed, so that they are not proposed again."""
        view = copy.copy(history)
        view.proposed = history.proposed | earlier | {strategy.overrides for strategy in self._rejected}
        view.proposals = history.proposals + len(self._rejected)
        view.rejected = tuple(self._rejected)
        return view

    def _show(self, suggestion: Suggestion) -> None:
        gain = "" if suggestion.expected_gain is None else f"\n  expected gain: {suggestion.expected_gain:.2%}"
        why = clean(suggestion.why, 600) or "no reason given"
        self.show(f"{suggestion.by} proposes {suggestion.strategy}\n  {why}{gain}")

    def _decision(
        self, suggestion: Suggestion, history: History, space: Space, forecaster: Forecaster
    ) -> Suggestion | None:
        """Asks the person; returns the suggestion as accepted or edited, None if it is rejected."""
        while True:
            answer = self._read(QUESTION).lower()
            if answer in ("a", "accept"):
                return suggestion
            if answer in ("r", "reject"):
                return None
            if answer in ("q", "quit"):
                raise Exhausted("ended by its user; the same command goes on")
            if answer in ("e", "edit"):
                edited = self._edit(suggestion, history, space, forecaster)
                if edited is not None:
                    return edited
                self._show(suggestion)

    def _edit(
        self, suggestion: Suggestion, history: History, space: Space, forecaster: Forecaster
    ) -> Suggestion | None:
        """Asks for overrides until they give a valid strategy; returns None if the person leaves the edit."""
        while line := self._read(EDIT):
            try:
                strategy = edit(suggestion.strategy, line, space, self.configured)
            except UserError as error:
                self.show(f"  {error}")
                continue
            objections = objections_to(strategy, history, forecaster)
            if not objections:
                record = {**suggestion.record, "edited_from": list(suggestion.strategy.overrides)}
                why = f"edited by its user; {suggestion.by} had proposed {suggestion.strategy}"
                return replace(suggestion, strategy=strategy, by="user", why=why, expected_gain=None, record=record)
            self.show(f"  {objections[0]}")
        return None

    def _read(self, question: str) -> str:
        try:
            return self.read(question).strip()
        except EOFError:
            raise Exhausted("ended by its user; the same command goes on") from None


def edit(strategy: Strategy, line: str, space: Space, configured: Callable[[str], Any]) -> Strategy:
    """Returns the strategy with overrides in Hydra's grammar applied: other methods, or other values of knobs.

    An added method starts from its configured values, or from the nearest values in the space.

    Raises:
        UserError: an override of anything but methods and their knobs, or a strategy that is not in the space.
    """
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(shlex.split(line))
    except (HydraException, ValueError) as error:
        raise UserError(f"{line}: {str(error).splitlines()[0]}") from None
    methods, knobs = list(strategy.methods), dict(strategy.knobs)
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override() or override.is_add() or override.is_delete() or override.package:
            raise UserError(f"{override.input_line}: give one value, e.g. method.rtn.bits=3")
        if key == "method":
            methods = [str(name) for name in value] if isinstance(value, list) else [str(value)]
        elif key.startswith("method."):
            knobs[key] = value
        else:
            raise UserError(f"{override.input_line}: only methods and their knobs can be edited here")
    nodes = []
    for name in methods:
        method = next((m for m in space.methods if m.name == name), None)
        prefix = f"method.{name}."
        own_knobs = {k.removeprefix(prefix): v for k, v in knobs.items() if k.startswith(prefix)}
        if method is not None and name not in strategy.methods:
            own_knobs = {k.removeprefix(prefix): v for k, v in method.defaults(configured).items()} | own_knobs
        nodes.append({"name": name, "knobs": own_knobs})
    for key in knobs:
        if key.split(".")[1] not in methods and key not in strategy.knobs:
            raise UserError(f"{key}: the strategy has no such method; name it in method=[...] too")
    edited, objections = strategy_of(nodes, space)
    if edited is None:
        raise UserError(objections[0])
    return edited


def _with_rejected(accepted: Suggestion, rejected: list[Suggestion]) -> Suggestion:
    """Returns the accepted suggestion with the rejected ones, and their tokens and cost, in its record."""
    if not rejected:
        return accepted
    record = dict(accepted.record)
    record["rejected"] = [list(s.strategy.overrides) for s in rejected]
    records = [s.record for s in (*rejected, accepted) if s.record.get("tokens")]
    if records:
        record["tokens"] = {side: sum(int(r["tokens"].get(side, 0)) for r in records) for side in ("input", "output")}
        costs = [r["usd"] for r in records if r.get("usd") is not None]
        record["usd"] = sum(costs) if costs else None
    messages = dict(accepted.messages)
    if any(s.messages for s in rejected):
        messages["rejected"] = [{**as_proposal(s.strategy), **s.messages} for s in rejected]
    return replace(accepted, record=record, messages=messages)
