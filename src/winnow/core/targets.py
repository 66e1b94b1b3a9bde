"""Resolves a `_target_` of the configuration to a class or function."""

from __future__ import annotations

import importlib
from typing import Any

# targets in configurations that earlier versions wrote (`.hydra/config.yaml` of a trial) -> where they are now
MOVED = {
    "winnow.agent.llm.policy.LLM": "winnow.agent.llm.steering.LLM",
    "winnow.method.oneshot.FP8": "winnow.method.oneshot_8bit.FP8",
    "winnow.method.oneshot.SmoothQuant": "winnow.method.oneshot_8bit.SmoothQuant",
    "winnow.model.gguf.package.smollm2": "winnow.model.packaged.smollm2",
    "winnow.model.load.pretrained": "winnow.model.pretrained.pretrained",
    "winnow.nano.model.trained": "winnow.nano.embedded.trained",
    "winnow.nano.model.untrained": "winnow.nano.embedded.untrained",
}


def target_of(path: str) -> Any:
    """Returns the class or function that a `_target_` names."""
    module, _, name = MOVED.get(path, path).rpartition(".")
    return getattr(importlib.import_module(module), name)
