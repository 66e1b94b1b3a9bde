"""Language models some of whose linear layers are products of two narrower ones: W ~ B A, with `low_rank` naming their ranks.

Self-contained: a copy lies beside the weights of every such model, so that transformers alone loads it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from typing import Any

from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def product_in_place_of(linear: Any, rank: int) -> nn.Sequential:
    """Two linear layers, not initialised, with the inputs, outputs and bias of one."""
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    down = nn.Linear(linear.in_features, rank, bias=False, **like)
    up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **like)
    return nn.Sequential(down, up)


class LowRank(nn.Module):
    """Replaces the linear layers that the configuration names, when the model is made."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, rank in (config.low_rank or {}).items():
            self.set_submodule(name, product_in_place_of(self.get_submodule(name), rank))


# tensor parallelism has no plan for products, and would shard one half of a layer alone


class LowRankLlamaConfig(LlamaConfig):
    model_type = "lowrank_llama"
    base_model_tp_plan = None
    low_rank: dict | None = None


class LowRankLlamaForCausalLM(LowRank, LlamaForCausalLM):
    config_class = LowRankLlamaConfig


class LowRankMistralConfig(MistralConfig):
    model_type = "lowrank_mistral"
    base_model_tp_plan = None
    low_rank: dict | None = None


class LowRankMistralForCausalLM(LowRank, MistralForCausalLM):
    config_class = LowRankMistralConfig


class LowRankQwen2Config(Qwen2Config):
    model_type = "lowrank_qwen2"
    base_model_tp_plan = None
    low_rank: dict | None = None


class LowRankQwen2ForCausalLM(LowRank, Qwen2ForCausalLM):
    config_class = LowRankQwen2Config


class LowRankQwen3Config(Qwen3Config):
    model_type = "lowrank_qwen3"
    base_model_tp_plan = None
    low_rank: dict | None = None


class LowRankQwen3ForCausalLM(LowRank, Qwen3ForCausalLM):
    config_class = LowRankQwen3Config


class LowRankGemma3Config(Gemma3TextConfig):
    model_type = "lowrank_gemma3_text"
    base_model_tp_plan = None
    low_rank: dict | None = None


class LowRankGemma3ForCausalLM(LowRank, Gemma3ForCausalLM):
    config_class = LowRankGemma3Config


MODELS = (
    LowRankLlamaForCausalLM,
    LowRankMistralForCausalLM,
    LowRankQwen2ForCausalLM,
    LowRankQwen3ForCausalLM,
    LowRankGemma3ForCausalLM,
)
