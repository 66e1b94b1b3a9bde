"""Calls a language model with time limits and retries, and counts the cost.

Transient errors (429, 500s, time-outs, cut connections) lead to retries after exponentially growing waits with jitter, or after
the wait that the endpoint asks for; permanent errors (a wrong key, an unknown model) stop all use of the model at once. A
transcript records every call, failed ones included, without keys.
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
)  # errors that the client raises for a malformed answer
TRANSIENT = (408, 409, 425, 429)  # and all from 500 on
FIRST_WAIT_S = 1.0
CHARACTERS_PER_TOKEN = 4  # an estimate, for endpoints that report no usage
STRUCTURED = ("function_calling", "json_schema", "json_mode", "text")

Message = dict[str, str]  # role and content


class Dead(Exception):
    """Raised if the model gives no answer for this proposal; `final` means for no later one, either."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass
class Transcript:
    """The calls for one proposal, and their cost.

    Attributes:
        prices: USD per million tokens, `input` and `output`; None if unknown.
        calls: node of the graph, messages, and answer or error of each call.
        tokens: `input` and `output` tokens of all calls.
        estimated: True if the endpoint did not report the tokens of some calls.
    """

    prices: Mapping[str, float] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"input": 0, "output": 0})
    estimated: bool = False

    @property
    def usd(self) -> float | None:
        """The cost of all calls; None if the prices are unknown."""
        if self.prices is None:
            return None
        return sum(self.tokens[side] * self.prices[side] for side in ("input", "output")) / 1e6


@dataclass
class Chat:
    """A chat model that answers in JSON.

    Attributes:
        make: creates the langchain model from its name, key and time limit; the model does not retry itself.
        name: name of the model; empty means the first that the endpoint lists.
        structured: how JSON is requested: by a tool, by the schema, as any JSON, or by the prompt only.
        attempts: attempts per question.
        timeout_s: time limit of each attempt as a whole.
        longest_wait_s: longest wait between attempts; if the endpoint asks for more, there is no answer for the proposal.
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
        """Returns the answer as JSON.

        Raises:
            Dead: there is no answer.
            Unusable: the answer cannot be read.
        """
        call: dict[str, Any] = {"node": node, "messages": [dict(m) for m in messages]}
        transcript.calls.append(call)
        started = self.clock()
        try:
            raw, parsed = self._call_with_retries(messages, schema, call)
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
        """Returns a text, or JSON of texts, without keys."""
        return scrub(text, "" if self.key == NO_KEY else self.key)

    def _call_with_retries(self, messages: Sequence[Message], schema: dict[str, Any], call: dict[str, Any]) -> Any:
        for attempt in range(1, self.attempts + 1):
            try:
                return _within(self.timeout_s, lambda: self._call(messages, schema))
            except Exception as error:
                wait = self._wait(error, attempt)
                call.setdefault("failed", []).append(self._description(error))
            if attempt < self.attempts:
                self.sleep(wait)
        raise Dead(f"{call['failed'][-1]}, {self.attempts} times")

    def _call(self, messages: Sequence[Message], schema: dict[str, Any]) -> tuple[Any, Any]:
        """Returns the raw message of the model and, for structured requests, its parsed JSON."""
        if self._model is None:
            self.name = self.name or self._first_model()
            settings = {"model": self.name} if self.name else {}
            self._model = self.make(**settings, api_key=self.key, timeout=self.timeout_s)
        if self.structured == "text":
            return self._model.invoke(list(messages)), None
        structured_model = self._model.with_structured_output(schema, method=self.structured, include_raw=True)
        response = structured_model.invoke(list(messages))
        return response["raw"], response["parsed"]

    def _first_model(self) -> str:
        """Returns the first model that an OpenAI-compatible endpoint lists; "" if it lists none."""
        client = self.make(model="unknown", api_key=self.key, timeout=self.timeout_s).root_client
        return next((str(model.id) for model in client.models.list().data), "")

    def _wait(self, error: Exception, attempt: int) -> float:
        """Returns how long to wait after an error, in seconds.

        Raises:
            Dead: the call must not be tried again.
            Unusable: there was an answer, but the client could not read it.
        """
        status = _status(error)
        description = self._description(error)
        if status is None and (isinstance(error, MALFORMED) or "FinishReason" in type(error).__name__):
            raise Unusable(f"The answer could not be read ({description}); give the JSON object.") from error
        if status in FINAL or _code(error) == "insufficient_quota":
            raise Dead(f"{FINAL.get(status or 0, 'the quota is used up')} ({description})", final=True) from error
        if status is not None and 400 <= status < 500 and status not in TRANSIENT:
            raise Dead(description) from error
        requested_wait = retry_after(_headers(error), self.clock())
        if requested_wait is None:
            longest = min(self.longest_wait_s, FIRST_WAIT_S * 2.0 ** (attempt - 1))
            return longest * self.rng.uniform(0.5, 1.0)
        if requested_wait > self.longest_wait_s:
            raise Dead(f"the endpoint asks to wait for {requested_wait:.0f} s ({description})") from error
        return requested_wait

    def _description(self, error: BaseException) -> str:
        status = _status(error)
        text = clean(self.scrub(str(error)), 200)
        return f"{type(error).__name__}: {text}" if status is None else f"status {status}: {text}"

    def _count(
        self, raw: Any, messages: Sequence[Message], text: str, transcript: Transcript, call: dict[str, Any]
    ) -> None:
        """Adds the tokens of a call to the transcript, estimated from lengths if the endpoint reports none."""
        usage = getattr(raw, "usage_metadata", None) or {}
        tokens = {side: max(0, int(usage.get(f"{side}_tokens") or 0)) for side in ("input", "output")}
        if not any(tokens.values()):
            transcript.estimated = True
            characters = sum(len(m["content"]) for m in messages)
            tokens = {"input": characters // CHARACTERS_PER_TOKEN, "output": len(text) // CHARACTERS_PER_TOKEN}
        call["tokens"] = tokens
        for side, count in tokens.items():
            transcript.tokens[side] += count


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds that an endpoint asks to wait, as a number or as a date; None if it does not ask."""
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
    """Returns the result of the call; raises TimeoutError if it takes longer, even while an answer still arrives."""
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _text(raw: Any) -> str:
    """Returns the content of a message: the arguments of its tool calls, or its text if it calls no tool."""
    calls = [json.dumps(call["args"]) for call in getattr(raw, "tool_calls", None) or []]
    calls += [str(call["args"] or "") for call in getattr(raw, "invalid_tool_calls", None) or []]
    if calls:
        return calls[0] if len(calls) == 1 else "\n".join(calls)
    content = raw.content
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error or of its cause."""
    for exception in (error, error.__cause__):
        response = getattr(exception, "response", None)
        for status in (
            getattr(exception, "status_code", None),
            getattr(response, "status_code", None),
            getattr(exception, "code", None),
        ):
            if isinstance(status, int) and 400 <= status < 600:
                return int(status)
    return None


def _code(error: BaseException) -> str:
    body = getattr(error, "body", None)
    return str(body.get("code", "")) if isinstance(body, dict) else ""


def _headers(error: BaseException) -> Mapping[str, str]:
    """Returns the HTTP headers of an error or of its cause, with lower-case names."""
    for exception in (error, error.__cause__):
        headers = getattr(getattr(exception, "response", None), "headers", None)
        if headers is not None:
            return {str(name).lower(): str(value) for name, value in headers.items()}
    return {}
