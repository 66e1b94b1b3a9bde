"""Repairs a model's generation settings so that they can be saved, and defines winnow's greedy decoding.

transformers loads settings that it later refuses to save, after all methods have run. It also obeys settings, such as a
repetition penalty, that other runtimes lack: the figures of one study would then come from different decodings.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
logger = logging.getLogger(__name__)
_ISSUE = re.compile(r"^- `(\w+)`:", re.MULTILINE)  # how transformers names a setting that it refuses to save
# settings that greedy decoding takes from the model: special tokens and the KV cache; all others change the decoding
_USED = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "cache_config")
_UNUSED = (  # limits that each request sets, sampling settings without effect on greedy decoding, and metadata
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "transformers_version", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip


def remove_unsavable_settings(model: Any, path: str) -> None:
    """Resets the generation settings that have no effect and could not be saved; a warning names them.

    Raises:
        UserError: transformers refuses the remaining settings.
    """
    from transformers import GenerationConfig

    settings, defaults = model.generation_config, GenerationConfig()
    if settings is None:
        return
    issues = _ISSUE.findall(_validation_error(settings))
    for name in issues:
        setattr(settings, name, getattr(defaults, name, None))
    remaining_error = _validation_error(settings)
    if remaining_error:
        raise UserError(
            f"model.path={path}: transformers refuses its generation settings: {remaining_error}; correct {FILE}"
        )
    if issues:
        logger.warning(f"{path}: {', '.join(issues)} in its generation settings have no effect, and are left out")


def _validation_error(settings: GenerationConfig) -> str:
    try:
        settings.validate(strict=True)  # type: ignore[no-untyped-call]
    except ValueError as error:
        return str(error)
    return ""


def greedy(settings: GenerationConfig, vocab_size: int) -> tuple[GenerationConfig, dict[str, Any]]:
    """Returns the greedy settings that winnow uses in every runtime, and the model's settings that it ignores."""
    from transformers import GenerationConfig

    model_settings = settings.to_diff_dict()  # type: ignore[no-untyped-call]
    greedy_settings = GenerationConfig(
        **{name: model_settings[name] for name in _USED if name in model_settings}, do_sample=False
    )
    if not 0 <= (greedy_settings.pad_token_id or 0) < vocab_size:
        greedy_settings.pad_token_id = None
    greedy_settings._from_model_config = False  # otherwise `generate` reads them again from the model's configuration
    ignored = {k: v for k, v in model_settings.items() if k not in (*_USED, *_UNUSED) and not k.startswith("_")}
    return greedy_settings, ignored
