"""One place for the calls of a language model: time limits, retries, and what they cost.

What may pass (429, 500s, time-outs, cut connections) is tried again after exponentially growing waits with jitter, or after the
wait that the endpoint asks for; what will not (a wrong key, an unknown model) ends the model's part at once. Every call is
written down, the failed ones too, without keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from winnow.agent.llm.critic import clean
from winnow.agent.llm.providers import NO_KEY
from winnow.agent.llm.reader import MOST_BYTES, Unusable, json_of, scrub

FINAL = {
    401: "the key is refused",
    402: "the account is empty",
    403: "access is refused",
    404: "there is no such model",
}
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)  # what the client raises for an answer of the wrong form
PASSING = (408, 409, 425, 429)  # and all from 500 on
FIRST_WAIT_S = 1.0
CHARACTERS_A_TOKEN = 4  # where an endpoint does not say what it has used
STRUCTURED = ("function_calling", "json_schema", "json_mode", "text")

Message = dict[str, str]  # role and content


class Dead(Exception):
    """No answer is to be had for this proposal; `final`: nor for any later one."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass
class Transcript:
    """What was said for one proposal, and what it took.

    Attributes:
        calls: of each, the node of the graph, its messages, the answer or the error.
        prices: USD per million tokens, `input` and `output`; None where they are not known.
    """

    prices: Mapping[str, float] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"input": 0, "output": 0})
    estimated: bool = False  # some of the tokens, because the endpoint did not say

    @property
    def usd(self) -> float | None:
        if self.prices is None:
            return None
        return sum(self.tokens[side] * self.prices[side] for side in ("input", "output")) / 1e6


@dataclass
class Chat:
    """A chat model that answers in JSON.

    Attributes:
        make: makes the model of langchain from its name, key and time limit; it does not retry itself.
        name: of the model; empty: the first that the endpoint lists.
        structured: how JSON is asked for: by a tool, by the schema, as any JSON, or in words only.
        attempts: of each question.
        timeout_s: of each attempt, as a whole.
        longest_wait_s: between attempts; an endpoint that asks for more is given up for the proposal.
    """

    make: Callable[..., Any]
    name: str
    key: str = field(repr=False)
    structured: str = "function_calling"
    attempts: int = 4
    timeout_s: float = 60.0
    longest_wait_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    _model: Any = field(default=None, init=False, repr=False)

    def ask(self, node: str, messages: Sequence[Message], schema: dict[str, Any], transcript: Transcript) -> Any:
        """The answer as JSON.

        Raises:
            Dead: there is none.
            Unusable: it cannot be read.
        """
        call: dict[str, Any] = {"node": node, "messages": [dict(m) for m in messages]}
        transcript.calls.append(call)
        started = self.clock()
        try:
            raw, parsed = self._persistently(messages, schema, call)
        except (Dead, Unusable) as error:
            call["error"] = str(error)
            raise
        finally:
            call["seconds"] = round(self.clock() - started, 3)
        text = _text(raw)
        call["answer"] = self.scrub(text.encode("utf-8", "replace")[:MOST_BYTES].decode("utf-8", "ignore"))
        self._count(raw, messages, text, transcript, call)
        if isinstance(parsed, dict) and len(text) <= MOST_BYTES:
            return parsed
        return json_of(text, list(schema["properties"]))

    def scrub(self, text: Any) -> Any:
        return scrub(text, "" if self.key == NO_KEY else self.key)

    def _persistently(self, messages: Sequence[Message], schema: dict[str, Any], call: dict[str, Any]) -> Any:
        for attempt in range(1, self.attempts + 1):
            try:
                return _within(self.timeout_s, lambda: self._call(messages, schema))
            except Exception as error:
                wait = self._wait(error, attempt)
                call.setdefault("failed", []).append(self._described(error))
            if attempt < self.attempts:
                self.sleep(wait)
        raise Dead(f"{call['failed'][-1]}, {self.attempts} times")

    def _call(self, messages: Sequence[Message], schema: dict[str, Any]) -> tuple[Any, Any]:
        if self._model is None:
            self.name = self.name or self._served()
            named = {"model": self.name} if self.name else {}
            self._model = self.make(**named, api_key=self.key, timeout=self.timeout_s)
        if self.structured == "text":
            return self._model.invoke(list(messages)), None
        asked = self._model.with_structured_output(schema, method=self.structured, include_raw=True)
        found = asked.invoke(list(messages))
        return found["raw"], found["parsed"]

    def _served(self) -> str:
        """The first model that an OpenAI-compatible endpoint lists; empty where it lists none."""
        client = self.make(model="unknown", api_key=self.key, timeout=self.timeout_s).root_client
        return next((str(model.id) for model in client.models.list().data), "")

    def _wait(self, error: Exception, attempt: int) -> float:
        """How long to wait after an error, in seconds.

        Raises:
            Dead: it is not to be tried again.
            Unusable: there was an answer, but not one that the client understands.
        """
        status = _status(error)
        said = self._described(error)
        if status is None and (isinstance(error, MALFORMED) or "FinishReason" in type(error).__name__):
            raise Unusable(f"The answer could not be read ({said}); give the JSON object.") from error
        if status in FINAL or _code(error) == "insufficient_quota":
            raise Dead(f"{FINAL.get(status or 0, 'the quota is used up')} ({said})", final=True) from error
        if status is not None and 400 <= status < 500 and status not in PASSING:
            raise Dead(said) from error
        asked_for = retry_after(_headers(error), self.clock())
        if asked_for is None:
            longest = min(self.longest_wait_s, FIRST_WAIT_S * 2.0 ** (attempt - 1))
            return longest * self.rng.uniform(0.5, 1.0)
        if asked_for > self.longest_wait_s:
            raise Dead(f"the endpoint asks to wait for {asked_for:.0f} s ({said})") from error
        return asked_for

    def _described(self, error: BaseException) -> str:
        status = _status(error)
        text = clean(self.scrub(str(error)), 200)
        return f"{type(error).__name__}: {text}" if status is None else f"status {status}: {text}"

    def _count(
        self, raw: Any, messages: Sequence[Message], text: str, transcript: Transcript, call: dict[str, Any]
    ) -> None:
        used = getattr(raw, "usage_metadata", None) or {}
        tokens = {side: max(0, int(used.get(f"{side}_tokens") or 0)) for side in ("input", "output")}
        if not any(tokens.values()):
            transcript.estimated = True
            asked = sum(len(m["content"]) for m in messages)
            tokens = {"input": asked // CHARACTERS_A_TOKEN, "output": len(text) // CHARACTERS_A_TOKEN}
        call["tokens"] = tokens
        for side, count in tokens.items():
            transcript.tokens[side] += count


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that an endpoint asks to wait, given as a number or as a date; None where it does not."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return None if math.isnan(seconds) else max(0.0, seconds)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    return None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns; a TimeoutError if it takes longer, as where an answer comes a byte at a time."""
    ended: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except Exception as error:
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _text(raw: Any) -> str:
    """All that a message says: arguments of tools where it calls one, else its words."""
    calls = [json.dumps(call["args"]) for call in getattr(raw, "tool_calls", None) or []]
    calls += [str(call["args"] or "") for call in getattr(raw, "invalid_tool_calls", None) or []]
    if calls:
        return calls[0] if len(calls) == 1 else "\n".join(calls)
    content = raw.content
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _status(error: BaseException) -> int | None:
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        for found in (
            getattr(one, "status_code", None),
            getattr(response, "status_code", None),
            getattr(one, "code", None),
        ):
            if isinstance(found, int) and 400 <= found < 600:
                return int(found)
    return None


def _code(error: BaseException) -> str:
    body = getattr(error, "body", None)
    return str(body.get("code", "")) if isinstance(body, dict) else ""


def _headers(error: BaseException) -> Mapping[str, str]:
    for one in (error, error.__cause__):
        headers = getattr(getattr(one, "response", None), "headers", None)
        if headers is not None:
            return {str(name).lower(): str(value) for name, value in headers.items()}
    return {}
