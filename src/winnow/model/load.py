"""Loads a model and its tokenizer through transformers, and reports every failure in one clear message.

Weights are read from safetensors only, unless the user allows pickle. A model's own code runs only if the user trusts it.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.model import adapter, generation, manifest, own_architectures
from winnow.model.folder_checks import gguf_file, has_tokenizer, no_tokenizer
from winnow.model.keys import check_keys
from winnow.model.loading import Loading
from winnow.model.loading_errors import plain_errors
from winnow.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto_round reads the variable on import
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it warns about an optional kernel on import


def _import_transformers() -> None:
    """Imports transformers without its optional packages, unless it is already imported."""
    importlib.import_module("winnow.model.import_transformers")


def load_model(path: str, loading: Loading) -> PreTrainedModel:
    """Loads the model into memory, in evaluation mode, on its device.

    Raises:
        UserError: the model cannot be loaded; the message says why.
    """
    if gguf_file(Path(path)) is not None:
        raise UserError(
            f"model.path={path} is a GGUF file, which llama.cpp serves but no method works on; "
            f"start from the model that it was made of"
        )
    _import_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    from winnow.model.packing import set_product_dtype

    own_architectures.register()
    dtype: Any = loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)
    with quiet(), plain_errors(path):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=loading.attn_implementation,
            device_map=loading.device if loading.device != "cpu" else None,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=None if loading.allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_keys` reports them with the others
        )
        check_keys(loading_info, path)
        generation.remove_unsavable_settings(model, path)
        if (Path(path) / "config.json").is_file():
            _decompress(model)
        if loading.dtype != "auto":
            set_product_dtype(model, dtype)
        elif model.device.type == "cpu":
            _avoid_float16(model)
        adapter_folder = adapter.folder_of(path)
        if adapter_folder is not None:
            model = adapter.load(model, adapter_folder)
    return model.eval()  # type: ignore[no-any-return]


def _decompress(model: PreTrainedModel) -> None:
    """Runs one forward pass, in which compressed-tensors unpacks its weights, so that this happens while loading."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    if model.config.quantization_config.quant_method == "compressed-tensors":
        import torch

        with torch.no_grad():  # not inference mode: its tensors could not be used in training
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))


def _avoid_float16(model: PreTrainedModel) -> None:
    """Casts AutoRound's weights to bfloat16: on CPUs its packed layers are tens of times slower in float16. Scales stay."""
    import torch

    from winnow.model.packing import cast_weights

    settings = getattr(model.config, "quantization_config", None)
    if model.dtype == torch.float16 and getattr(settings, "quant_method", None) == "auto-round":
        cast_weights(model, torch.bfloat16)


def identity(path: str, loading: Loading) -> str:
    """Returns the hash of a folder's content, or the commit of a hub model (its id, if the commit is unknown)."""
    if Path(path).is_dir():
        return manifest.content_hash(Path(path))
    _import_transformers()
    from transformers import AutoConfig

    with quiet(), plain_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        return str(getattr(config, "_commit_hash", None) or path)


def load_config(path: str, loading: Loading) -> PretrainedConfig:
    """Loads the configuration of a model in a folder or on the hub."""
    _import_transformers()
    from transformers import AutoConfig

    own_architectures.register()
    with quiet(), plain_errors(path):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
    return config


def load_tokenizer(path: str, loading: Loading) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; without a valid pad token it pads with the end-of-text token, which the attention mask hides.

    Raises:
        UserError: the tokenizer is missing or cannot be loaded.
    """
    _import_transformers()
    from transformers import AutoConfig, AutoTokenizer

    own_architectures.register()
    with quiet(), plain_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        except (ValueError, OSError) as error:
            if Path(path).is_dir() and not has_tokenizer(Path(path)):
                raise UserError(no_tokenizer(Path(path))) from error
            raise
    _complete_special_tokens(tokenizer, config, path)
    return tokenizer  # type: ignore[no-any-return]


def _complete_special_tokens(tokenizer: Any, config: PretrainedConfig, path: str) -> None:
    """Sets a tokenizer's missing special tokens from the model's configuration, and its pad token."""
    text = config.get_text_config()
    vocab_size = getattr(text, "vocab_size", None) or len(tokenizer)
    for name in ("bos", "eos"):
        ids = getattr(text, f"{name}_token_id", None)
        config_id = ids[0] if isinstance(ids, list) and ids else ids
        token, number = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if token is not None and number < vocab_size:
            continue
        is_valid = isinstance(config_id, int) and 0 <= config_id < min(vocab_size, len(tokenizer))
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(config_id) if is_valid else None)
        if token is not None:
            logger.warning(
                f"{path}: its {name} token {token} is number {number:,} of {vocab_size:,} tokens that the model has; "
                f"{getattr(tokenizer, f'{name}_token') or 'none'} takes its place"
            )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= vocab_size:
        logger.warning(
            f"{path}: its pad token {tokenizer.pad_token} is number {pad:,} of {vocab_size:,} tokens that the model has; "
            f"the end-of-text token takes its place"
        )
    if pad is None or pad >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
