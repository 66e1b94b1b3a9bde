"""AutoRound's tuning of one decoder block, and a walk that brings the blocks to the device one after the other.

The library's own entry point is not used: it downloads the whole repository of a model whose folder is gone, takes a model
beside whose files a processor lies for one of images, calls every block with the masks and rotary embeddings of the first
(Gemma's alternate), and drops documents shorter than its `seqlen` without a word. Its `quantize_block`, made for
llm-compressor, does the same work without all that.

Imported only where a model is compressed: the library alone takes seconds to import.
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
from winnow.method.blocks import Caught, block_inputs, compute_dtype
from winnow.method.checkpoint import Checkpoint
from winnow.model.layers import decoder_blocks, linears, linears_in
from winnow.model.lm import LM
from winnow.model.packing import cast_weights, quantize_linear
from winnow.model.quiet import quiet

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # remarks on optional kernels, once an import
# it puts its own `warning_once` in the place of transformers', whose remarks would then come in its name
with (
    mock.patch.object(logging.Logger, "warning_once", logging.Logger.warning_once),  # type: ignore[attr-defined]
    quiet(),
):
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # type: ignore[import-untyped]

# the library's at its default of 200 iterations; the 1 / iters that it takes for fewer leaves the rounding of weights that do
# not matter to chance (embedded model, 2 bits, perplexity after 10 iterations: 1.988, with this 1.913; rtn: 2.320)
LEARNING_RATE = 0.005
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tuning:
    """Settings of the library; without `iters` it only searches the scale of each group."""

    bits: int
    group_size: int
    iters: int
    batch_size: int


def rows_of(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tokens in rows [1, T] as long as the longest document, which the library can batch in any order.

    Shorter documents follow one another in a row; nothing is padded and nothing left out (the last row starts early enough to
    be full, and has tokens of the row before).
    """
    length = max(batch.shape[1] for batch in batches)
    stream = torch.cat([batch.flatten() for batch in batches])
    starts = list(range(0, len(stream) - length + 1, length))
    if starts[-1] + length < len(stream):
        starts.append(len(stream) - length)
    return [stream[start : start + length][None] for start in starts]


def tune_blocks(lm: LM, run: Run, tuning: Tuning, rows: Sequence[torch.Tensor], checkpoint: Checkpoint) -> None:
    """Rounds the linear layers of all blocks, which carry a quantization scheme (`packing.attach_scheme`).

    A block is tuned to put out what it did before, from inputs that come out of the blocks tuned already. Weights that were
    zero stay zero.

    Raises:
        UserError: weights or scales are not finite afterwards.
    """
    blocks = decoder_blocks(lm.model)
    with torch.no_grad():
        exact, caught = block_inputs(lm.model, blocks, rows, compute_dtype(lm.model, run))
    _check_batching(lm.model, rows[0], caught[0][0])
    tuned: list[torch.Tensor] | None = None  # hidden states after the tuned blocks; `exact`: after those as they were
    if checkpoint.done:
        states = checkpoint.restore(blocks)
        exact, tuned = states[: len(rows)], states[len(rows) :] or None
    with contained():
        for index in range(checkpoint.done, len(blocks)):
            exact, tuned = _tune(blocks[index], lm, run, tuning, exact, tuned, caught[index])
            run.log(f"autoround: block {index + 1} of {len(blocks)}")
            checkpoint.save(blocks, index + 1, [*exact, *(tuned or [])])


def _check_batching(model: Any, row_1t: torch.Tensor, extras: Caught) -> None:
    """Refuses blocks that are called with something whose first axis counts rows and heads together: rows are put in batches.

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
    caught: Sequence[Caught],
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """One block; returns what it puts out as it was and, where the library goes on from it, as it is now."""
    dtype, computed = lm.model.dtype, compute_dtype(lm.model, run)
    layers = {m: n for n, m in linears_in(block).items()}
    zeros = {linear: linear.weight == 0 for linear in layers}
    own = {module: set(vars(module)) for module in block.modules()}
    block.requires_grad_(False).to(run.device)
    cast_weights(block, computed)
    rounding = AutoRound(
        _Alone(block, lm.model.config, computed),
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
        low_gpu_mem_usage=True,  # hidden states and the best rounding so far stay in main memory
        enable_torch_compile=run.device != "cpu",  # for processors it would need a C++ compiler
        seed=run.seed,
        scale_dtype=_SHORT[dtype],
        amp=computed == torch.bfloat16
        or (computed == torch.float16 and run.device != "cpu"),  # else in single precision
    )
    inputs = [(((state, *args), kwargs),) for state, (args, kwargs) in zip(exact, caught, strict=True)]
    with torch.enable_grad():
        now, before = rounding.quantize_block(block, inputs, q_input=tuned, device=run.device, auto_offload=False)
    block.cpu()
    cast_weights(block, dtype)
    linear: Any
    for linear, name in layers.items():
        scale, kept = linear.scale, zeros[linear]
        linear.weight.data.masked_fill_(kept, 0)
        if not (scale.isfinite().all() and linear.weight.isfinite().all()):
            raise UserError(
                f"autoround: the weights of {name} are not finite after tuning; check the model with evaluate.py, and "
                f"calibrate on text that it knows (calibration.source)"
            )
        quantize_linear(linear, scale)
    for module, names in own.items():
        for name in set(vars(module)) - names - {"integers"}:
            delattr(module, name)
    return before or exact, now


class _Alone(nn.Module):
    """A model of one block, in which the library finds it; without a path, so that it looks for no files."""

    def __init__(self, block: nn.Module, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = copy.copy(config)
        self.config.name_or_path = self.name_or_path = ""
        self.dtype = dtype
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([block])


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undoes what the library does to the process: seeds, environment, print options, deterministic algorithms.

    It also collects garbage several times a block: what lives now need not be looked at each time.
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
    """Replaces the linear layers of the blocks by the library's packed ones, and says so in the configuration."""
    blocks = decoder_blocks(model)
    for name, linear in linears(model).items():
        scale = linear.weight_scale.data.float()
        packed = QuantLinear(bits, group_size, linear.in_features, linear.out_features, linear.bias is not None)
        packed.pack(linear, scale, 2 ** (bits - 1))
        if linear.bias is not None:
            packed.bias = linear.bias.data  # not rounded to float16
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
