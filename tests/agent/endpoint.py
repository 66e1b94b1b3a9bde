"""A scripted OpenAI-compatible server on loopback: it speaks the wire protocol, and serves answers and faults from a list."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


@dataclass(frozen=True)
class Say:
    """An answer in the form that the request asks for: as a tool's arguments, or as content.

    Attributes:
        content: JSON, or the text itself.
    """

    content: Any
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))


@dataclass(frozen=True)
class Words:
    """An answer in plain content, also where a tool was to be called."""

    content: str | None


@dataclass(frozen=True)
class Fault:
    """An HTTP error, or any other body."""

    status: int
    body: str = '{"error": {"message": "scripted", "type": "scripted", "code": null}}'
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """No answer as long as the server lives."""


@dataclass(frozen=True)
class Cut:
    """The connection ends in the middle of an answer."""


Step = Say | Words | Fault | Hang | Cut


class Endpoint:
    """Serves `script`, one step a request for a proposal, the last one for ever; `route` answers the coordinator.

    Attributes:
        requests: bodies of the requests, in order.
        headers: of each.
        proposals: of these, how many asked for proposals.
    """

    def __init__(self, *script: Step | Callable[[dict[str, Any]], Step], route: Step | None = None) -> None:
        self.script = list(script)
        self.route = route or Say({"why": "a wide gap", "specialist": "quantization"})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.proposals = 0
        self._closing = threading.Event()

    def __enter__(self) -> Endpoint:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, json.dumps({"object": "list", "data": [{"id": "served-model", "object": "model"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                step = endpoint._step(body)
                if isinstance(step, Fault):
                    self._send(step.status, step.body, step.headers)
                elif isinstance(step, Hang):
                    endpoint._closing.wait(60)
                    self.close_connection = True
                elif isinstance(step, Cut):
                    self._send(200, '{"id": "cut", "choices": [', length=10_000)
                    self.close_connection = True
                else:
                    self._send(200, json.dumps(completion(body, step)))

            def _send(
                self, status: int, text: str, headers: dict[str, str] | None = None, length: int | None = None
            ) -> None:
                content = text.encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def said(self, request: int) -> str:
        """All that was said in a request."""
        return "\n".join(str(message["content"]) for message in self.requests[request]["messages"])

    def _step(self, body: dict[str, Any]) -> Step:
        if asked_for(body) == "route":
            return self.route
        step = self.script[min(self.proposals, len(self.script) - 1)]
        self.proposals += 1
        return step(body) if callable(step) else step


def asked_for(body: dict[str, Any]) -> str:
    """Which schema a request names, in whatever way."""
    if body.get("tools"):
        return str(body["tool_choice"]["function"]["name"])
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return str(wanted["json_schema"]["name"])
    return "route" if '"title": "route"' in body["messages"][0]["content"] else "propose"


def completion(body: dict[str, Any], step: Say | Words) -> dict[str, Any]:
    """The response to a request for a chat completion."""
    content = step.content
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    reason = "stop"
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    if isinstance(step, Say) and body.get("tools"):
        function = {"name": body["tool_choice"]["function"]["name"], "arguments": text}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        reason = "tool_calls"
    else:
        message["content"] = text
    usage = step.usage if isinstance(step, Say) else dict(USAGE)
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        **({"usage": usage} if usage else {}),
    }


def propose(*strategies: dict[str, Any], **more: Any) -> Say:
    """An answer that proposes strategies, each `{method: {knob: value}}`."""
    proposals = [
        {
            "reason": "it fills a gap",
            "methods": [{"name": name, "knobs": knobs} for name, knobs in strategy.items()],
            "confidence": 0.6,
        }
        for strategy in strategies
    ]
    return Say({"proposals": proposals, **more})
