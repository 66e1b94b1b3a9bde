"""A person decides: each proposal is shown with its reason, and accepted, edited or rejected before it runs.

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
from winnow.core.cli import say
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Policy, Suggestion
from winnow.study.space import Space

MOST_REJECTED = 5  # for one trial
QUESTION = "[a]ccept, [e]dit, [r]eject, [q]uit? "
EDIT = "overrides, e.g. method=[wanda,rtn] method.rtn.bits=3 (empty: back): "


def check_terminal() -> None:
    """Raises UserError where nobody can answer."""
    if not sys.stdin.isatty():
        raise UserError("interactive=true needs a terminal to ask in; leave it out, or run search.py in one")


@dataclass
class Interactive:
    """Puts every proposal of a policy to a person.

    Attributes:
        configured: the configured value of a knob by its full key, for methods that an edit adds.
    """

    policy: Policy
    configured: Callable[[str], Any] = lambda key: None
    read: Callable[[str], str] = input
    show: Callable[[str], None] = say
    _rejected: list[Strategy] = field(default_factory=list, init=False, repr=False)

    def ask(self, history: History, space: Space, outlook: Forecaster) -> Suggestion:
        """What the person has accepted.

        Raises:
            Exhausted: the person ends the search, or rejects everything.
        """
        before = {tuple(overrides) for trial in history.trials for overrides in trial.decision.get("rejected", ())}
        now: list[Suggestion] = []
        while len(now) < MOST_REJECTED:
            suggestion = self.policy.ask(self._without_rejected(history, before), space, outlook)
            self._show(suggestion)
            chosen = self._chosen(suggestion, history, space, outlook)
            if chosen is not None:
                return _with_costs(chosen, now)
            now.append(suggestion)
            self._rejected.append(suggestion.strategy)
        raise Exhausted(f"{MOST_REJECTED} proposals in a row were rejected; the same command goes on")

    def _without_rejected(self, history: History, before: set[tuple[str, ...]]) -> History:
        """The history as the policy is to see it: what was rejected counts as seen, and is not proposed again."""
        view = copy.copy(history)
        view.seen = history.seen | before | {strategy.overrides for strategy in self._rejected}
        view.proposals = history.proposals + len(self._rejected)
        view.rejected = tuple(self._rejected)
        return view

    def _show(self, suggestion: Suggestion) -> None:
        gain = "" if suggestion.expected_gain is None else f"\n  expected gain: {suggestion.expected_gain:.2%}"
        why = clean(suggestion.why, 600) or "no reason given"
        self.show(f"{suggestion.by} proposes {suggestion.strategy}\n  {why}{gain}")

    def _chosen(self, suggestion: Suggestion, history: History, space: Space, outlook: Forecaster) -> Suggestion | None:
        """The suggestion as accepted or edited; None if it is rejected."""
        while True:
            answer = self._read(QUESTION).lower()
            if answer in ("a", "accept"):
                return suggestion
            if answer in ("r", "reject"):
                return None
            if answer in ("q", "quit"):
                raise Exhausted("ended by its user; the same command goes on")
            if answer in ("e", "edit"):
                edited = self._edited(suggestion, history, space, outlook)
                if edited is not None:
                    return edited
                self._show(suggestion)

    def _edited(self, suggestion: Suggestion, history: History, space: Space, outlook: Forecaster) -> Suggestion | None:
        while line := self._read(EDIT):
            try:
                strategy = edit(suggestion.strategy, line, space, self.configured)
            except UserError as error:
                self.show(f"  {error}")
                continue
            objections = objections_to(strategy, history, outlook)
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
    """The strategy with overrides in Hydra's grammar: other methods, or other values of knobs.

    A method that is added starts from its configured values, or the first of its choices.

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
        own = f"method.{name}."
        given = {k.removeprefix(own): v for k, v in knobs.items() if k.startswith(own)}
        if method is not None and name not in strategy.methods:
            given = {k.removeprefix(own): v for k, v in method.defaults(configured).items()} | given
        nodes.append({"name": name, "knobs": given})
    for key in knobs:
        if key.split(".")[1] not in methods and key not in strategy.knobs:
            raise UserError(f"{key}: the strategy has no such method; name it in method=[...] too")
    found, objections = strategy_of(nodes, space)
    if found is None:
        raise UserError(objections[0])
    return found


def _with_costs(chosen: Suggestion, rejected: list[Suggestion]) -> Suggestion:
    """Accepted, with what was rejected before, and with what that took of a language model."""
    if not rejected:
        return chosen
    record = dict(chosen.record)
    record["rejected"] = [list(s.strategy.overrides) for s in rejected]
    used = [s.record for s in (*rejected, chosen) if s.record.get("tokens")]
    if used:
        record["tokens"] = {side: sum(int(r["tokens"].get(side, 0)) for r in used) for side in ("input", "output")}
        known = [r["usd"] for r in used if r.get("usd") is not None]
        record["usd"] = sum(known) if known else None
    messages = dict(chosen.messages)
    if any(s.messages for s in rejected):
        messages["rejected"] = [{**as_proposal(s.strategy), **s.messages} for s in rejected]
    return replace(chosen, record=record, messages=messages)
