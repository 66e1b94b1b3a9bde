"""Loading without remarks and progress bars of the libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and remarks of the loading libraries."""
    import tqdm.std
    import transformers.utils.logging as tl
    from transformers.utils import logging as hf_logging

    bars, level = tl.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    noisy.setLevel(logging.ERROR)
    bar = tqdm.std.tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:  # compressed-tensors has no switch for its bars
        bar(self, *args, **{**kwargs, "disable": True})

    try:
        with warnings.catch_warnings(), mock.patch.object(tqdm.std.tqdm, "__init__", hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
