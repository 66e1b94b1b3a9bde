"""Generation settings: those of a model, made fit to be saved again; and the one way in which winnow decodes.

transformers loads settings that it then refuses to save, hours later, when all methods have run. And it obeys settings, such as a
repetition penalty, that other runtimes do not know: figures of one study would be of different decodings.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
_LOG = logging.getLogger(__name__)
_ISSUE = re.compile(r"^- `(\w+)`:", re.MULTILINE)  # how transformers names a setting that it would not save
# what decoding needs to know of the model: its special tokens and its cache; everything else is another way to decode
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "cache_config")
_UNUSED = (  # limits that each request brings, sampling that greedy decoding does not do, and notes
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "transformers_version", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip


def mend(model: Any, path: str) -> None:
    """Takes out of a loaded model's settings what has no effect and could not be saved; a warning names it.

    Raises:
        UserError: transformers refuses what is left.
    """
    from transformers import GenerationConfig

    settings, neutral = model.generation_config, GenerationConfig()
    if settings is None:
        return
    issues = _ISSUE.findall(_complaint(settings))
    for name in issues:
        setattr(settings, name, getattr(neutral, name, None))
    rest = _complaint(settings)
    if rest:
        raise UserError(f"model.path={path}: transformers refuses its generation settings: {rest}; correct {FILE}")
    if issues:
        _LOG.warning(f"{path}: {', '.join(issues)} in its generation settings have no effect, and are left out")


def _complaint(settings: GenerationConfig) -> str:
    try:
        settings.validate(strict=True)  # type: ignore[no-untyped-call]
    except ValueError as error:
        return str(error)
    return ""


def greedy(settings: GenerationConfig, vocab_size: int) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings with which winnow decodes in every runtime, plainly greedily; and those of the model that it does not follow."""
    from transformers import GenerationConfig

    given = settings.to_diff_dict()  # type: ignore[no-untyped-call]
    plain = GenerationConfig(**{name: given[name] for name in _KEPT if name in given}, do_sample=False)
    if not 0 <= (plain.pad_token_id or 0) < vocab_size:
        plain.pad_token_id = None
    plain._from_model_config = False  # else `generate` reads them from the model's configuration once more
    ignored = {k: v for k, v in given.items() if k not in (*_KEPT, *_UNUSED) and not k.startswith("_")}
    return plain, ignored
