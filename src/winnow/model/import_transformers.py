"""Imports transformers' models and generation without optional packages that winnow does not use.

transformers imports every optional package that is installed. These take half of its import time, and winnow needs
none of them there:

- scikit-learn (lm-eval needs it), for a curve in assisted generation;
- scipy, for the losses of object detection;
- boto3 (the Ray launcher needs it), for accelerate's support of Amazon SageMaker;
- torch's compiler, which hqq (the extra `kv`) uses for layers that the quantized cache does not need.

The module must be imported before any other import of `transformers.generation`: it is on the preload list of the fork server, and
is imported when a command first needs a model, a configuration or a tokenizer. The packages can be imported as usual afterwards.
hqq's layers run uncompiled in such a process, which is their default.
"""
# ruff: noqa: F401

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Hides packages from imports inside the block, except those that are already imported."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python raises ModuleNotFoundError for this value
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """Makes `torch.compile` return functions unchanged inside the block: it imports the compiler even when that is disabled."""
    import torch

    def return_function(function: Any = None, **settings: Any) -> Any:
        return function if function is not None else lambda function: function

    original: Any = torch.compile
    torch.compile = return_function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _has_cached_check(package: str) -> bool:
    """Returns whether transformers has already checked for a package: it caches the result, and would import a package it found."""
    check = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{package}_available", None)
    return check is not None and check.cache_info().currsize > 0


with _hidden("boto3", *(x for x in ("scipy", "sklearn") if not _has_cached_check(x))), _without_compile():
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
