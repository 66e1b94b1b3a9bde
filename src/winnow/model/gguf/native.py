"""The optional libraries of this package: present or named, and llama.cpp silent."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator
from typing import Any

from winnow.types import MissingExtra

_ERROR, _CONTINUED = 4, 5  # levels of ggml's log; a line may come in parts


def require(llama_cpp: bool = True) -> None:
    """Raises MissingExtra where the libraries that quantize GGUF files (without `llama_cpp`: read and write) are missing."""
    for module, library in (("gguf", "gguf"), ("llama_cpp", "llama-cpp-python"))[: 2 if llama_cpp else 1]:
        try:
            __import__(module)
        except ImportError:
            raise MissingExtra(library, "gguf") from None


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


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

    callback = llama_cpp.llama_log_callback(listen)  # must live as long as llama.cpp may call it
    before, its_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(its_data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(before, its_data)
