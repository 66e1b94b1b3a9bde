"""Counts against published ones, sizes against weights that are really held."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from tests.llama_8b import LLAMA_8B
from winnow.core.errors import UserError
from winnow.model.spec import spec

LLAMA = LlamaConfig(**LLAMA_8B)
QWEN_HALF_B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=32768,
    dtype="bfloat16",
)
MISTRAL: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GEMMA_270M = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
    max_position_embeddings=32768,
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("config", "parameters", "cache_bytes", "tied"),
    [
        (LLAMA, 8_030_261_248, 131_072, False),
        (QWEN_HALF_B, 494_032_768, 12_288, True),
        (MistralConfig(vocab_size=32768, sliding_window=None, **MISTRAL), 7_248_023_552, 131_072, False),
        (MistralConfig(vocab_size=32000, sliding_window=4096, **MISTRAL), 7_241_732_096, 131_072, False),
        (GEMMA_270M, 268_098_176, 18_432, True),
    ],
    ids=["llama-3.1-8b", "qwen2.5-0.5b", "mistral-7b-v0.3", "mistral-7b-v0.1", "gemma-3-270m"],
)
def test_published_models(config: Any, parameters: int, cache_bytes: int, tied: bool) -> None:
    found = spec(config)
    assert found.parameters == parameters
    assert found.kv_cache_bytes_per_token == cache_bytes
    assert found.tied is tied
    assert found.size_bytes[16] == 2 * parameters
    assert found.size_bytes[32] == 4 * parameters
    sizes = [found.size_bytes[bits] for bits in (2, 3, 4, 8, 16, 32)]
    assert sizes == sorted(sizes)


def test_quantized_sizes_are_packed_weights_and_scales() -> None:
    found = spec(LLAMA, group_size=128)
    rest = found.parameters - found.linear_parameters
    assert found.embedding_parameters == 2 * 128256 * 4096
    assert rest == found.embedding_parameters + (2 * 32 + 1) * 4096  # and the norms
    assert found.size_bytes[4] == found.linear_parameters // 2 + found.linear_parameters // 128 * 2 + 2 * rest
    assert spec(LLAMA, group_size=32).size_bytes[4] > found.size_bytes[4]


def test_windows_bound_the_cache() -> None:
    windowed = spec(MistralConfig(vocab_size=32000, sliding_window=4096, **MISTRAL))
    assert windowed.kv_cache_bytes(1000) == 1000 * 131072
    assert windowed.kv_cache_bytes(32768) == 4096 * 131072
    gemma = spec(GEMMA_270M)
    assert gemma.cache_windows.count(512) == 15
    assert gemma.kv_cache_bytes(2048, batch=2) == 2 * 1024 * (15 * 512 + 3 * 2048)
    assert spec(QWEN_HALF_B).kv_cache_bytes(32768) == 32768 * 12288
    assert spec(LLAMA).kv_cache_bytes(100, bits=4) == 100 * 131072 // 4


def test_a_nested_configuration_describes_its_text_decoder_and_counts_everything() -> None:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 18, "num_attention_heads": 2}
    nested = spec(Gemma3Config(text_config=GEMMA_270M.to_dict(), vision_config=vision))
    text = spec(GEMMA_270M)
    assert nested.linear_parameters == text.linear_parameters  # though the vision tower has as many layers
    assert nested.embedding_parameters == text.embedding_parameters
    assert nested.cache_windows == text.cache_windows
    assert nested.parameters > text.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_real_model(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    model, found = LlamaForCausalLM(config), spec(config, group_size=32)
    linear = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.linear_parameters == sum(w.numel() for w in linear)
    assert found.lora_width == sum(sum(w.shape) for w in linear)
    with torch.inference_mode():
        cache = model(torch.zeros((3, 10), dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert found.kv_cache_bytes(10, batch=3) == held


def test_memory_grows_with_the_work() -> None:
    found = spec(LLAMA)
    assert found.memory_to_run(4, 4096) < found.memory_to_run(16, 4096) < found.memory_to_run(16, 4096, batch=4)
    assert found.memory_to_run(16, 4096) > found.size_bytes[16] + found.kv_cache_bytes(4096)
    full, lora = found.memory_to_train(context=2048), found.memory_to_train("lora", context=2048)
    assert full > 16 * found.parameters > lora > found.size_bytes[16]
    assert found.memory_to_train("lora", context=2048, bits=4) < lora
    assert found.memory_to_train("lora", context=2048, checkpointing=False) > lora


def test_it_prints_and_survives_json() -> None:
    found = spec(QWEN_HALF_B)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["parameters"] == 494_032_768
    assert plain["size_bytes"]["16"] == 988_065_536
    table = str(found)
    assert "494,032,768" in table and "estimated" in table
    assert max(map(len, table.splitlines())) <= 100


def test_it_reads_a_folder_and_leaves_the_configuration_alone(tmp_path: Any) -> None:
    GEMMA_270M.save_pretrained(tmp_path)
    before = GEMMA_270M.to_dict()
    assert spec(tmp_path) == spec(GEMMA_270M)
    assert GEMMA_270M.to_dict() == before
    with pytest.raises(ValueError, match="dtype=int8"):
        spec(GEMMA_270M, dtype="int8")


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="MambaForCausalLM: its configuration has no num_attention_heads"):
        spec(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
