"""Optional libraries: present, or named with the extra that brings them."""

from __future__ import annotations

import importlib.util

from winnow.core.errors import MissingExtra

# the module that is imported -> the package as pip knows it, and winnow's extra with it
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
    """Whether there is such a module; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is imported already, by something that gave it no spec
        return True


def require(*modules: str) -> None:
    """Raises MissingExtra for the first of the modules that is not installed."""
    for module in modules:
        if not is_installed(module):
            raise MissingExtra(*_EXTRAS[module])
