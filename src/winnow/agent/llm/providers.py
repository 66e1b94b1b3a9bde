"""Lists the chat models that may steer, and reads their keys from the environment and nowhere else."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from winnow.core.errors import MissingExtra, UserError

NO_KEY = "none"  # sent to a local server that needs no key
_SECRET = re.compile(r"api_?key|secret|password|credential|token(?!s)|headers|_target_", re.IGNORECASE)
_RESERVED = ("max_retries", "timeout", "request_timeout", "callbacks", "http_client", "http_async_client", "streaming")


@dataclass(frozen=True)
class Provider:
    """A package with a chat model.

    Attributes:
        package: the package to install.
        variables: environment variables that may hold the key; the first one that is set counts.
        once: the value of `max_retries` with which its client tries once and leaves retries to `Chat`.
    """

    package: str
    variables: tuple[str, ...]
    once: int = 0


PROVIDERS = {
    "langchain_openai.ChatOpenAI": Provider("langchain-openai", ("OPENAI_API_KEY",)),
    "langchain_openai.AzureChatOpenAI": Provider("langchain-openai", ("AZURE_OPENAI_API_KEY",)),
    "langchain_anthropic.ChatAnthropic": Provider("langchain-anthropic", ("ANTHROPIC_API_KEY",)),
    "langchain_google_genai.ChatGoogleGenerativeAI": Provider(
        "langchain-google-genai", ("GOOGLE_API_KEY", "GEMINI_API_KEY"), once=1
    ),
    "langchain_mistralai.ChatMistralAI": Provider("langchain-mistralai", ("MISTRAL_API_KEY",), once=1),
}


def check_installed(target: str, key: str) -> None:
    """Raises UserError if the package of the chat model that the config names under `key` is not installed."""
    module, package = target.partition(".")[0], PROVIDERS[target].package
    for library in (module, "langgraph"):
        if importlib.util.find_spec(library) is None:
            if library in ("langchain_openai", "langgraph"):
                raise MissingExtra(library, "agent")
            raise UserError(f"{key}._target_={target}: install it with: pip install {package}")


def provider_of(model: Callable[..., Any]) -> Provider:
    """Returns the provider of a chat model's class, or of a partial of it."""
    model_class = getattr(model, "func", model)
    name = f"{model_class.__module__.partition('.')[0]}.{model_class.__name__}"
    if name not in PROVIDERS:
        raise UserError(f"agent.llm._target_={name} is no chat model that may steer; one of {', '.join(PROVIDERS)} can")
    return PROVIDERS[name]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError for settings that a configuration must not hold: keys, and settings that the search makes itself."""
    for name, value in settings.items():
        if _SECRET.search(name):
            raise UserError(f"agent.llm.{name} may hold a key, which comes from the environment only; leave it out")
        if name in _RESERVED:
            raise UserError(f"agent.llm.{name} is set by the search: see agent.timeout_s and agent.attempts")
        if "url" in name or "endpoint" in name:
            parts = urlsplit(str(value))
            if parts.username or parts.password or parts.query:
                raise UserError(f"agent.llm.{name} holds credentials or a query; keys come from the environment only")
        if isinstance(value, Mapping):
            check_settings({str(inner): v for inner, v in value.items()})


def key_of(provider: Provider, variable: str | None, base_url: str | None) -> tuple[str, str]:
    """Returns the key, and the name of the variable that holds it; a server on this machine or its network needs no key.

    Raises:
        UserError: the environment has no key.
    """
    names = (variable,) if variable else provider.variables
    for name in names:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip(), name
    if base_url and _is_local(base_url):
        return NO_KEY, names[0]
    raise UserError(
        f"{names[0]} is not set: agent.llm needs a key from the environment. Set it, name another agent (agent=gp), or let one "
        f"stand in with agent.fallback=gp"
    )


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".localhost", ".internal")) or "." not in host
