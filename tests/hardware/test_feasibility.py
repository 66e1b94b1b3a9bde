"""What fits where, for models of published size."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from winnow.hardware.feasibility import HEADROOM, feasible
from winnow.model.spec import ModelSpec, spec

GB = 10**9


@pytest.fixture(scope="module")
def llama_8b() -> ModelSpec:
    return spec(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            dtype="bfloat16",
        )
    )


def test_it_runs_where_it_is_known_to_run(llama_8b: ModelSpec) -> None:
    assert feasible(llama_8b, 24 * GB, bits=16, context=4096).fits
    assert not feasible(llama_8b, 12 * GB, bits=16, context=4096).fits
    assert feasible(llama_8b, 12 * GB, bits=4, context=4096).fits


def test_it_trains_where_it_is_known_to_train(llama_8b: ModelSpec) -> None:
    assert not feasible(llama_8b, 80 * GB, "train").fits
    assert feasible(llama_8b, 48 * GB, "lora").fits
    assert feasible(llama_8b, 24 * GB, "lora", bits=4).fits


def test_the_reason_names_a_way_out(llama_8b: ModelSpec) -> None:
    short = feasible(llama_8b, 12 * GB, context=4096)
    assert "needed" in short.reason and "it fits at 8 bits" in short.reason
    assert "LoRA fits at 16 bits" in feasible(llama_8b, 48 * GB, "train").reason
    assert "smaller model" in feasible(llama_8b, 1 * GB).reason
    assert "it fits" not in feasible(llama_8b, 80 * GB, context=4096).reason


def test_the_limit_is_sharp(llama_8b: ModelSpec) -> None:
    needed = feasible(llama_8b, 80 * GB, context=1024).needed_bytes
    assert feasible(llama_8b, int(needed / HEADROOM) + 2, context=1024).fits
    assert not feasible(llama_8b, int(needed / HEADROOM) - 2, context=1024).fits
    with pytest.raises(ValueError, match="bits=5"):
        feasible(llama_8b, GB, bits=5)
