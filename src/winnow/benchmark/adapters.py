"""Gives the lm-eval model of the runtime that serves a model."""

from __future__ import annotations

import importlib
from typing import Any

from winnow.model.lm import LM
from winnow.runtime import Served


def scorer(served: Served, lm: LM, batch_size: int, max_gen_toks: int | None = None) -> Any:
    """Returns an `lm_eval.api.model.LM`, which also has `count_tokens`, over an open model.

    Args:
        batch_size: sequences at a time.
        max_gen_toks: upper limit of tokens to generate for an answer; None leaves that of each task.
    """
    module = importlib.import_module(f"winnow.benchmark.{served.name}_adapter")
    return module.make_adapter(served, lm.tokenizer, batch_size, max_gen_toks)
