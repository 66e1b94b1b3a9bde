"""The peers of `bench/methods.py`: the libraries called as their own examples do, on the same tokens, with the same settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BITS, GROUP_SIZE, SPARSITY = 4, 64, 0.5


def loader(batches: Sequence[torch.Tensor]) -> Any:
    from torch.utils.data import DataLoader

    rows = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    return DataLoader(rows, batch_size=None)


def one_shot(model: Any, recipe: Any, batches: Sequence[torch.Tensor], output: Path) -> None:
    from llmcompressor import oneshot

    oneshot(model=model, dataset=loader(batches), recipe=recipe, num_calibration_samples=len(batches))
    model.save_pretrained(output, save_compressed=True)


def weights_only() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def gptq(model: Any, tokenizer: Any, batches: Sequence[torch.Tensor], output: Path) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    one_shot(model, GPTQModifier(config_groups=weights_only(), ignore=["lm_head"]), batches, output)


def awq(model: Any, tokenizer: Any, batches: Sequence[torch.Tensor], output: Path) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # it pins memory for an accelerator that is not there
        IntermediatesCache._pin_intermediate = staticmethod(lambda value, *_: value)
    recipe = [AWQModifier(), QuantizationModifier(config_groups=weights_only(), ignore=["lm_head"])]
    one_shot(model, recipe, batches, output)


def wanda(model: Any, tokenizer: Any, batches: Sequence[torch.Tensor], output: Path) -> None:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    recipe = WandaPruningModifier(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"])
    one_shot(model, recipe, batches, output)


def autoround(model: Any, tokenizer: Any, batches: Sequence[torch.Tensor], output: Path) -> None:
    from auto_round import AutoRound

    rows = [row[None] for batch in batches for row in batch]
    rounding = AutoRound(
        model, tokenizer, scheme="W4A16", bits=BITS, group_size=GROUP_SIZE, iters=ITERATIONS, dataset=rows,
        nsamples=len(rows), seqlen=rows[0].shape[1], device_map=str(model.device),
    )  # fmt: skip
    rounding.quantize_and_save(str(output), format="auto_round")


ITERATIONS = 50
PEERS = {"gptq": gptq, "awq": awq, "autoround": autoround, "wanda": wanda}
