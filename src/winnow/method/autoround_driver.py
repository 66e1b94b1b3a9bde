"""Runs AutoRound's tuning on the decoder blocks, one block at a time on the device.

The library's own entry point is not used: it downloads the whole repository of a model whose folder is missing, treats a model
with a processor file as an image model, calls every block with the masks and rotary embeddings of the first block (Gemma's
alternate), and silently drops documents shorter than its `seqlen`. Its `quantize_block`, made for llm-compressor, does the
same work without these problems.

This module is imported only to compress a model: the library alone takes seconds to import.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers.utils.logging  # noqa: F401 (before the library: it defines `warning_once`)
from torch import nn

from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.method.blocks import ExtraArgs, block_inputs, compute_dtype
from winnow.method.checkpoint import Checkpoint
from winnow.model.layers import decoder_blocks, linears, linears_in
from winnow.model.lm import LM
from winnow.model.packing import cast_weights, quantize_linear
from winnow.model.quiet import quiet

logger = logging.getLogger(__name__)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hides remarks on optional kernels at import
# the library replaces transformers' `warning_once`, whose messages would then appear in its name
with (
    mock.patch.object(logging.Logger, "warning_once", logging.Logger.warning_once),  # type: ignore[attr-defined]
    quiet(),
):
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # type: ignore[import-untyped]

# the library's value at its default of 200 iterations; its 1 / iters for fewer iterations rounds unimportant weights at random
# (embedded model, 2 bits, perplexity after 10 iterations: 1.988, with this value 1.913; rtn: 2.320)
LEARNING_RATE = 0.005
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tuning:
    """Settings of the library; with `iters` of 0 it only searches the scale of each group."""

    bits: int
    group_size: int
    iters: int
    batch_size: int


def rows_of(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the same tokens in rows [1, T] as long as the longest document, which the library can batch in any order.

    Shorter documents are concatenated in a row; nothing is padded or dropped (the last row starts early enough to be full,
    and repeats tokens of the row before).
    """
    length = max(batch.shape[1] for batch in batches)
    stream = torch.cat([batch.flatten() for batch in batches])
    starts = list(range(0, len(stream) - length + 1, length))
    if starts[-1] + length < len(stream):
        starts.append(len(stream) - length)
    return [stream[start : start + length][None] for start in starts]


def tune_blocks(lm: LM, run: Run, tuning: Tuning, rows: Sequence[torch.Tensor], checkpoint: Checkpoint) -> None:
    """Rounds the linear layers of all blocks; each must have a quantization scheme (`packing.attach_scheme`).

    A block is tuned to reproduce its original outputs from inputs that come from the blocks tuned before it. Zero weights
    stay zero.

    Raises:
        UserError: weights or scales are not finite afterwards.
    """
    blocks = decoder_blocks(lm.model)
    with torch.no_grad():
        exact, extra_args = block_inputs(lm.model, blocks, rows, compute_dtype(lm.model, run))
    _check_batching(lm.model, rows[0], extra_args[0][0])
    tuned: list[torch.Tensor] | None = None  # hidden states after tuned blocks; `exact`: after the original blocks
    if checkpoint.done:
        states = checkpoint.restore(blocks)
        exact, tuned = states[: len(rows)], states[len(rows) :] or None
    with process_state_restored():
        for index in range(checkpoint.done, len(blocks)):
            exact, tuned = _tune(blocks[index], lm, run, tuning, exact, tuned, extra_args[index])
            logger.info(f"autoround: block {index + 1} of {len(blocks)}")
            checkpoint.save(blocks, index + 1, [*exact, *(tuned or [])])


def _check_batching(model: Any, row_1t: torch.Tensor, extras: ExtraArgs) -> None:
    """Refuses blocks with an argument whose first axis counts rows and heads together, as rows are batched.

    Raises:
        UserError: the architecture's attention adds such biases (ALiBi).
    """
    for name, value in extras[1].items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[0] not in (1, *row_1t.shape):
            raise UserError(
                f"method=[autoround] tunes blocks on several rows at once, and those of {type(model).__name__} take `{name}` "
                f"[{', '.join(map(str, value.shape))}], which belongs to one; take method=[gptq] or [rtn]"
            )


def _tune(
    block: nn.Module,
    lm: LM,
    run: Run,
    tuning: Tuning,
    exact: list[torch.Tensor],
    tuned: list[torch.Tensor] | None,
    extra_args: Sequence[ExtraArgs],
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Tunes one block; returns its original outputs and, if the library continues from them, its outputs after tuning."""
    dtype, computed = lm.model.dtype, compute_dtype(lm.model, run)
    layers = {m: n for n, m in linears_in(block).items()}
    zeros = {linear: linear.weight == 0 for linear in layers}
    original_attributes = {module: set(vars(module)) for module in block.modules()}
    block.requires_grad_(False).to(run.device)
    cast_weights(block, computed)
    rounding = AutoRound(
        _BlockModel(block, lm.model.config, computed),
        lm.tokenizer,
        scheme=QuantizationScheme(
            bits=tuning.bits, group_size=tuning.group_size, sym=True, data_type="int", act_bits=16
        ),
        iters=tuning.iters,
        lr=min(LEARNING_RATE, 1 / tuning.iters) if tuning.iters else None,
        batch_size=tuning.batch_size,
        nsamples=len(exact),
        dataset=[],
        device_map=run.device,
        low_gpu_mem_usage=True,  # keeps hidden states and the best rounding so far in main memory
        enable_torch_compile=run.device != "cpu",  # on CPUs it would need a C++ compiler
        seed=run.seed,
        scale_dtype=_DTYPE_NAMES[dtype],
        # otherwise it computes in single precision
        amp=computed == torch.bfloat16 or (computed == torch.float16 and run.device != "cpu"),
    )
    inputs = [(((state, *args), kwargs),) for state, (args, kwargs) in zip(exact, extra_args, strict=True)]
    with torch.enable_grad():
        outputs_after, outputs_before = rounding.quantize_block(
            block, inputs, q_input=tuned, device=run.device, auto_offload=False
        )
    block.cpu()
    cast_weights(block, dtype)
    linear: Any
    for linear, name in layers.items():
        scale, mask = linear.scale, zeros[linear]
        linear.weight.data.masked_fill_(mask, 0)
        if not (scale.isfinite().all() and linear.weight.isfinite().all()):
            raise UserError(
                f"autoround: the weights of {name} are not finite after tuning; check the model with evaluate.py, and "
                f"calibrate on text that it knows (calibration.source)"
            )
        quantize_linear(linear, scale)
    for module, names in original_attributes.items():
        for name in set(vars(module)) - names - {"integers"}:
            delattr(module, name)
    return outputs_before or exact, outputs_after


class _BlockModel(nn.Module):
    """A model of one block for the library; it has no path, so that the library looks for no files."""

    def __init__(self, block: nn.Module, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = copy.copy(config)
        self.config.name_or_path = self.name_or_path = ""
        self.dtype = dtype
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([block])


@contextlib.contextmanager
def process_state_restored() -> Iterator[None]:
    """Restores what the library changes in the process: seeds, environment, print options, deterministic algorithms.

    The library collects garbage several times a block; freezing the existing objects makes that fast.
    """
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    gc.collect()
    gc.freeze()
    try:
        with (
            quiet(),
            torch.random.fork_rng(devices=[]),
            mock.patch.dict(os.environ),
            mock.patch.object(torch, "set_printoptions"),
        ):
            yield
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        random.setstate(states[0])
        np.random.set_state(states[1])


def pack_for_auto_round(model: Any, bits: int, group_size: int) -> None:
    """Replaces the linear layers of the blocks by the library's packed ones, and updates the configuration."""
    blocks = decoder_blocks(model)
    for name, linear in linears(model).items():
        scale = linear.weight_scale.data.float()
        packed = QuantLinear(bits, group_size, linear.in_features, linear.out_features, linear.bias is not None)
        packed.pack(linear, scale, 2 ** (bits - 1))
        if linear.bias is not None:
            packed.bias = linear.bias.data  # keeps its type instead of float16
        model.set_submodule(name, packed.eval())
    model.config.quantization_config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": next(name for name, module in model.named_modules() if module is blocks),
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "data_type": "int",
    }
