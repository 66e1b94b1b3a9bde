"""Handles the Hugging Face hub on machines that may have no network."""

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
    """Puts the hub's libraries into offline mode if its host name does not resolve; otherwise they retry for half a minute."""
    import huggingface_hub.constants as hub

    # datasets has its own switch, which exists only once datasets is imported
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
