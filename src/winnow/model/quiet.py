"""Silences the loading libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars, log messages and warnings of the loading libraries inside the block."""
    import tqdm.std
    import transformers.utils.logging as tl
    from transformers.utils import logging as hf_logging

    bars_enabled, level = tl.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    noisy.setLevel(logging.ERROR)
    original_init = tqdm.std.tqdm.__init__

    def init_disabled(
        self: Any, *args: Any, **kwargs: Any
    ) -> None:  # compressed-tensors has no switch for its progress bars
        original_init(self, *args, **{**kwargs, "disable": True})

    try:
        with warnings.catch_warnings(), mock.patch.object(tqdm.std.tqdm, "__init__", init_disabled):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars_enabled:
            hf_logging.enable_progress_bar()
