"""Shrinks the KV cache: quantizes it, or shortens the sliding window; the weights stay unchanged.

The settings are part of the artifact (`generation_config.json`, `config.json`), so that `generate` on the loaded artifact, as in
evaluation, uses that cache.

    python compress.py method=[kv] method.kv.bits=4
    python compress.py method=[gptq,kv] method.kv.bits=8
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM, FileLM

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class KV(BaseStage):
    """Keeps keys and values in `bits` bits, or only those of the last `window` tokens.

    Keys and values are quantized in groups of `group_size` numbers of one token and head, each with a scale and a zero of 16
    bits (`bits` + 32 / `group_size` bits a number); 16 bits leave them alone. The newest tokens, `residual` at most, wait
    unquantized until they are as many; a prompt is quantized at once. It takes models whose layers all see the whole text: that
    is what transformers' quantized cache can do. For models with a sliding window (Mistral, Gemma-3, Qwen2 with
    `use_sliding_window`) there is `bits=16` and a smaller `window` for the layers that have one; 0 leaves it.

    Only generated answers show the damage of `bits`: log-likelihoods are computed without a cache. A `window` acts on both.

    Source: per-token asymmetric groups and a residual as in KIVI, arXiv:2402.02750, section 3.2 (there keys per channel);
        rounded by HQQ (Badri and Shaji 2023, mobiusml.github.io/hqq_blog). Windows: Longformer, arXiv:2004.05150, section 3.1.
    Calibration: none.
    Cost: none to make. Each layer's cache is unpacked whole at every step, and quantized anew every `residual` tokens: memory
        falls, decoding gets slower. Embedded model, one core, 64 tokens after a prompt of 512: 2.94 MB of cache and 1.1 s
        at 16 bits, 1.72 MB and 1.7 s at 8, 1.06 MB and 2.2 s at 4, 0.73 MB and 2.4 s at 2.
    Writes: `generation_config.json` (`cache_implementation`, `cache_config`), `config.json` (`sliding_window`); weights as they
        were.
    Loaded by: transformers, with hqq for `bits` under 16. vLLM reads the window, and ignores the cache's bits (it has
        `kv_cache_dtype`); llama.cpp is told the type of its cache when it starts, so GGUF files are refused.
    """

    slot: ClassVar[Slot] = Slot.CACHE
    matrices: ClassVar[tuple[str, ...] | None] = None
    perplexity_bound: ClassVar[float] = 1.001  # not through the cache
    aggressive: ClassVar[dict[str, Any]] = {"bits": 2}
    eager_reason: ClassVar[str | None] = "keeps its own cache"

    bits: int = knob(4, choices=(2, 4, 8, 16), searched=(2, 4, 8))
    group_size: int = knob(64, choices=GROUPS)
    residual: int = knob(128, low=1, high=65536, search=False)
    window: int = knob(0, low=0, high=2**24, search=False)

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("hqq",) if self.bits < 16 else ()

    def predict(self, plan: ModelLayout) -> ModelLayout:
        config = copy.deepcopy(plan.config)
        self._check(config)
        if self.window:
            config.get_text_config(decoder=True).sliding_window = self.window
        bits = self.bits + 32 / self.group_size if self.bits < 16 else plan.cache_bits
        return dataclasses.replace(plan, config=config, cache_bits=bits, cache_residual=self.residual)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        return StageCost()

    def __call__(self, lm: LM, run: Run) -> StageResult:
        if isinstance(lm, FileLM):
            return StageResult(self._edit(lm))
        config = lm.model.config
        self._check(config)
        if self.bits < 16:
            self._record(lm.model.generation_config)
        if self.window:
            config.get_text_config(decoder=True).sliding_window = self.window
            for module in lm.model.modules():
                if getattr(module, "sliding_window", None):  # attention layers copied it from the config when built
                    module.sliding_window = self.window
        return StageResult(lm.with_model(lm.model))

    def _edit(self, lm: FileLM) -> FileLM:
        """Applies the settings to a folder of final files in the run's scratch space."""
        from transformers import AutoConfig, GenerationConfig

        folder = Path(lm.path)
        if any(folder.glob("*.gguf")):
            raise UserError(
                "method=[...,kv]: a GGUF file holds no settings of the cache, llama.cpp is told when it starts; leave kv out"
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=lm.loading.trust_remote_code)
        self._check(config)
        if self.bits < 16:
            has_own = (folder / "generation_config.json").is_file()
            generation = (
                GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig.from_model_config(config)
            )
            self._record(generation)
            generation.save_pretrained(folder)
        if self.window:
            file = folder / "config.json"
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.get("text_config", settings)["sliding_window"] = self.window
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return lm.with_files(folder)

    def _record(self, generation: GenerationConfig) -> None:
        """Writes the cache settings where `generate` reads them."""
        generation.use_cache = True
        generation.cache_implementation = "quantized"
        generation.cache_config = {
            "backend": "hqq",
            "nbits": self.bits,
            # 1: groups are within one token, and do not change when the cache is quantized again with more tokens
            "axis_key": 1,
            "axis_value": 1,
            "q_group_size": self.group_size,
            "residual_length": self.residual,
        }
        generation._from_model_config = False  # prevents rebuilding it from the model's configuration

    def _check(self, config: PretrainedConfig) -> None:
        """Raises UserError for settings that do not suit a model of this configuration."""
        if self.bits == 16 and not self.window:
            raise UserError("method.kv.bits=16 with method.kv.window=0 changes nothing; set one of them")
        text = config.get_text_config(decoder=True)
        kinds = _attention_kinds(text)
        if self.window:
            model_window = getattr(text, "sliding_window", None)
            if "sliding_attention" not in kinds or not model_window:
                raise UserError(
                    f"method.kv.window={self.window}: {config.model_type} models of this configuration have no sliding window; "
                    f"set method.kv.window=0 and quantize the cache with method.kv.bits"
                )
            if self.window >= model_window:
                raise UserError(
                    f"method.kv.window={self.window} is not smaller than the model's own window of {model_window}"
                )
        if self.bits == 16:
            return
        unsupported = ", ".join(sorted(kinds - {"full_attention"}))
        if unsupported:
            raise UserError(
                f"method.kv.bits={self.bits}: transformers quantizes the cache of full attention only, and this "
                f"{config.model_type} has layers of {unsupported}; set method.kv.bits=16 and, where there is a sliding window, "
                f"a smaller method.kv.window"
            )
        shapes = _cached_shapes(text)
        if not shapes:
            raise UserError(f"method.kv.bits={self.bits}: {config.model_type} keeps no keys and values; leave kv out")
        if not self._fits(self.group_size, shapes):
            fitting = [size for size in GROUPS if self._fits(size, shapes)]
            way_out = (
                f"set method.kv.group_size={fitting[-1]}" if fitting else "set more method.kv.bits or leave kv out"
            )
            raise UserError(
                f"method.kv.group_size={self.group_size}: groups must divide a head's width, and those of a token must fill "
                f"whole bytes at {self.bits} bits; this model caches {' and '.join(f'{h} x {w}' for h, w in shapes)} "
                f"(heads x width): {way_out}"
            )

    def _fits(self, group_size: int, shapes: list[tuple[int, int]]) -> bool:
        """Returns whether groups of this size suit caches of these shapes (heads, width)."""
        # hqq packs one number from each of 8 / bits equal parts of the groups into a byte, so their count must divide
        return all(
            width % group_size == 0 and heads * width // group_size % (8 // self.bits) == 0 for heads, width in shapes
        )


def _attention_kinds(text: PretrainedConfig) -> set[str]:
    """Returns the kinds of attention of a decoder's layers, as transformers' caches distinguish them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(text)
    return set(kinds)


def _cached_shapes(text: PretrainedConfig) -> list[tuple[int, int]]:
    """Returns (heads, width) of one token's cached keys and values; an empty list for models without attention."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return []
    if getattr(text, "kv_lora_rank", None):  # latent attention (DeepSeek) is cached uncompressed
        return [(heads, text.qk_nope_head_dim + text.qk_rope_head_dim), (heads, text.v_head_dim)]
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return [(getattr(text, "num_key_value_heads", None) or heads, width)]
