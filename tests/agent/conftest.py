"""What the tests of the language model's policy share."""

from __future__ import annotations

import pytest

from tests.agent.steered import KEY


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("LLM_API_KEY", raising=False)
