"""Checks that optional libraries are installed, and names the extra that installs a missing one."""

from __future__ import annotations

import importlib.util

from winnow.core.errors import MissingExtra

# module name -> (package name on PyPI, extra of winnow that installs it)
_EXTRAS = {
    "auto_round": ("auto-round", "autoround"),
    "bitsandbytes": ("bitsandbytes", "bnb"),
    "codecarbon": ("codecarbon", "energy"),
    "compressed_tensors": ("compressed-tensors", "packed"),
    "gguf": ("gguf", "gguf"),
    "hqq": ("hqq", "kv"),
    "llama_cpp": ("llama-cpp-python", "gguf"),
    "llmcompressor": ("llmcompressor", "llmcompressor"),
    "peft": ("peft", "peft"),
    "psycopg": ("psycopg", "postgres"),
    "pynvml": ("nvidia-ml-py", "energy"),
    "ray": ("ray", "ray"),
    "wandb": ("wandb", "wandb"),
}


def is_installed(module: str) -> bool:
    """Returns whether a module is installed, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # the module is already imported, without a spec
        return True


def require(*modules: str) -> None:
    """Raises MissingExtra for the first module that is not installed."""
    for module in modules:
        if not is_installed(module):
            raise MissingExtra(*_EXTRAS[module])
