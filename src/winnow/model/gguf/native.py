"""Silences the log of llama.cpp."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_ERROR, _CONTINUED = 4, 5  # levels of ggml's log; a line may arrive in several parts


@contextlib.contextmanager
def silent() -> Iterator[list[str]]:
    """Keeps llama.cpp from writing to standard error; yields the list to which its errors are added."""
    import llama_cpp

    errors: list[str] = []
    level = 0

    def listen(new_level: int, text: bytes, user_data: Any) -> None:
        nonlocal level
        level = level if new_level == _CONTINUED else new_level
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(listen)  # must stay referenced as long as llama.cpp may call it
    original_callback, original_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(original_callback), ctypes.byref(original_data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(original_callback, original_data)
