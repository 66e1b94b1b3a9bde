"""Importing this module imports transformers' models and generation, without optional packages that winnow has no use for.

transformers imports what happens to be installed. These packages are half of its time, and winnow uses none of them there:

- scikit-learn (lm-eval needs it), for a curve that assisted generation draws;
- scipy, for the losses of object detection;
- boto3 (the Ray launcher needs it), for accelerate's questions about Amazon SageMaker;
- torch's compiler, which hqq (the extra `kv`) asks for when it defines layers that the quantized cache does not have.

It comes before anything else that imports `transformers.generation`: on the preload list of a fork server, and where a command
first needs a model, its configuration or its tokenizer. The packages can be imported as usual afterwards. hqq's layers run
uncompiled in such a process, which is what they do by default.
"""
# ruff: noqa: F401

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Meanwhile these packages are not found by an import, except those that are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a module that is not to be found
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Meanwhile `torch.compile` gives functions back as they are: it imports the compiler even where that is switched off."""
    import torch

    def compiled(function: Any = None, **settings: Any) -> Any:
        return function if function is not None else lambda function: function

    before: Any = torch.compile
    torch.compile = compiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


def _answered(package: str) -> bool:
    """Whether transformers was asked for the package before: it keeps the answer, and would import what was there."""
    asked = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{package}_available", None)
    return asked is not None and asked.cache_info().currsize > 0


with _hidden("boto3", *(x for x in ("scipy", "sklearn") if not _answered(x))), _uncompiled():
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
