"""The Hugging Face hub where there may be no network."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """The hub's libraries in offline mode where its name does not resolve: else they try for half a minute."""
    import huggingface_hub.constants as hub

    # datasets keeps a switch of its own; it is only there to be set if something has imported it
    modules: list[Any] = [hub, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        if not proxied:
            host = urllib.parse.urlsplit(hub.ENDPOINT)
            socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
