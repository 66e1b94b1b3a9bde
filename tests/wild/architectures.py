"""Tiny random models of the architectures that people bring, with the embedded model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from winnow.model.lm import LM
from winnow.model.load import load_tokenizer
from winnow.model.loading import Loading
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

_USUAL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_GPT = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}

# by transformers' model_type, what its configuration is made of
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _USUAL,
    "mistral": _USUAL | {"sliding_window": 64},
    "qwen2": _USUAL | {"tie_word_embeddings": True},
    "qwen3": _USUAL | {"head_dim": 64},
    "gemma3_text": _USUAL
    | {"head_dim": 64, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _USUAL,
    "olmo2": _USUAL,
    "starcoder2": _USUAL | {"sliding_window": None},
    "stablelm": _USUAL,
    "cohere": _USUAL,
    "phi": _USUAL,
    "gpt_neox": _USUAL,
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 16},
    "gpt_bigcode": _GPT,
    "falcon": _USUAL | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "bloom": {"hidden_size": 256, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 256, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "opt": _USUAL | {"ffn_dim": 256, "word_embed_proj_dim": 256},
    "mixtral": _USUAL | {"num_local_experts": 4},
    "qwen2_moe": _USUAL | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 128},
    "qwen3_moe": _USUAL | _EXPERTS | {"num_experts": 4, "head_dim": 64},
    "olmoe": _USUAL | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _USUAL
    | _EXPERTS
    | _LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "granitemoe": _USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    "mamba": {"hidden_size": 256, "num_hidden_layers": 2},
}


def random_model(family: str, folder: Path, **changes: Any) -> Path:
    """A saved random model of an architecture, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(str(WEIGHTS), Loading())
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings = {"vocab_size": len(tokenizer), "dtype": "bfloat16", **ids, **ARCHITECTURES[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.bfloat16)
    save(LM(model=model, tokenizer=tokenizer, name=family), folder)
    return folder
