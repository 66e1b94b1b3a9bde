"""Loads the embedded model, trained or with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.model.lm import LM

WEIGHTS = Path(__file__).parent / "weights"


def untrained(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, max_length: int, seed: int, weights: bool = True
) -> LM:
    """Returns a Llama with random weights (on the meta device without `weights`) and a tokenizer of the nano world."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.model.lm import LM
    from winnow.nano.bpe import train_tokenizer

    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    with torch.device("cpu" if weights else "meta"):
        return LM(model=LlamaForCausalLM(config), tokenizer=tokenizer, name="nano")


def trained(path: str | None = None, **loading: Any) -> LM:
    """Loads the embedded model; the arguments are those of `winnow.model.pretrained.pretrained`."""
    from winnow.model.pretrained import pretrained

    return pretrained(path or str(WEIGHTS), **loading)
