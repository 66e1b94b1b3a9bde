"""A tiny random Llama, saved and in memory, and a workload that takes a fraction of a second."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from winnow.hardware.device import Hardware

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def _llama(**changes: Any) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": list(range(96))[:48],  # half of all tokens would end a request
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="session")
def make_llama() -> Any:
    """Makes a Llama with 5 thousand random parameters; keywords change its configuration."""
    return _llama


@pytest.fixture(autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Locks of its own, so that a search on this machine is not waited for; one thread, so that models this small are quick."""
    import torch

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    _llama().save_pretrained(path)
    return path


@pytest.fixture
def hardware() -> Hardware:
    return Hardware(
        "cpu", prompt_tokens=8, output_tokens=4, warmup=1, repeats=3, seconds=0, energy_tokens=16, watch=False
    )
