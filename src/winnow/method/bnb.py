"""8- and 4-bit weights by bitsandbytes: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) and NF4 with double
quantization (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Both are formats of transformers: the saved folder loads with plain `from_pretrained` where bitsandbytes is installed.

    python compress.py method=[nf4]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.types import LM, Checked, MissingExtra, Run, Slot, knob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _reloaded(lm: LM, run: Run, **settings: Any) -> PreTrainedModel:
    """The model written densely to scratch and read back through transformers' bitsandbytes loader."""
    import logging
    import shutil

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # remarks on optional kernels, once an import
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtra("bitsandbytes", "bnb") from None
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from winnow.model.load import quiet

    scratch = run.folder / "dense"
    try:
        with quiet():
            dtype = lm.model.dtype
            lm.model.save_pretrained(scratch)
            if dtype not in (torch.bfloat16, torch.float16):
                dtype = torch.bfloat16  # LLM.int8 and NF4 compute in half precision
            model = AutoModelForCausalLM.from_pretrained(
                scratch,
                dtype=dtype,
                attn_implementation=lm.loading.attention,
                quantization_config=BitsAndBytesConfig(**settings),
                device_map={"": run.device},
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for module in model.modules():
        # a forward on a processor with AVX512-BF16 would repack the weights for speed, and they could not be saved any more
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Int8(Checked):
    """LLM.int8: vector-wise 8-bit products, with input features above `threshold` kept in 16 bits."""

    slot: ClassVar[Slot] = Slot.QUANTIZE
    preload: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    threshold: float = knob(6.0, low=0.0, high=100.0, search=False)  # section 3.2; 0 turns the decomposition off

    def __call__(self, lm: LM, run: Run) -> LM:
        return lm.changed(_reloaded(lm, run, load_in_8bit=True, llm_int8_threshold=self.threshold))


@dataclass(frozen=True)
class NF4(Checked):
    """4-bit NormalFloat in blocks of 64, the blocks' scales quantized once more to 8 bits (0.127 bits a weight)."""

    slot: ClassVar[Slot] = Slot.QUANTIZE
    preload: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    def __call__(self, lm: LM, run: Run) -> LM:
        model = _reloaded(
            lm,
            run,
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=lm.model.dtype,
        )
        return lm.changed(model)
