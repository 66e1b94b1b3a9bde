"""Models to compress: the embedded one, and random tiny ones in the shapes of four families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from winnow.model.lm import LM
from winnow.model.load import load_tokenizer
from winnow.model.loading import Loading
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

FAMILIES = ("llama", "qwen2", "gemma3_text", "mistral")


def config_of(family: str, **changes: Any) -> Any:
    """Two layers, widths that every group size divides, grouped queries; Gemma-3 with one sliding and one full layer."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family in ("llama", "gemma3_text"),
        "dtype": "bfloat16",
    }
    if family == "gemma3_text":
        settings |= {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    if family == "mistral":
        settings |= {"sliding_window": 64}
    return AutoConfig.for_model(family, **settings | changes)


def random_model(family: str, folder: Path, **changes: Any) -> Path:
    """A saved random model of a family with the embedded model's tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(WEIGHTS), Loading())
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = config_of(family, **{"vocab_size": len(tokenizer), **ids, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # norms and biases that are all alike would hide mistakes in their handling
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save(LM(model=model, tokenizer=tokenizer, name=family), folder)
    return folder
