"""Runs llm-compressor's modifiers on a model in main memory, one decoder block at a time on the device.

The library's own entry point is not used: it reads the model's configuration from the hub again, replaces the model's
`save_pretrained`, uses any accelerator that it finds whatever the user chose, and rounds every norm of Gemma-like models to
the precision of 1 + weight. The library's session, pipelines and modifiers are used, so the result is the same.

This module is imported only to compress a model: the library alone takes seconds to import.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader

from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.method.blocks import compute_dtype
from winnow.model.layers import decoder_blocks, linears
from winnow.model.lm import LM
from winnow.model.packing import cast_weights, round_to_grid
from winnow.model.quiet import quiet

logger = logging.getLogger(__name__)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hides remarks on optional kernels at import
# LLM_COMPRESSOR_LOG_DISABLED would leave out a log level that GPTQ needs
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
with quiet():
    import llmcompressor.pipelines.data_free.pipeline as data_free
    import llmcompressor.pipelines.sequential.pipeline as sequential
    from compressed_tensors.offload import disable_offloading, remove_dispatch, update_offload_parameter
    from compressed_tensors.quantization import QuantizationStatus
    from llmcompressor.args import DatasetArguments
    from llmcompressor.core import create_session
    from llmcompressor.modeling.offset_norm import NormCalibrationModule, norm_calibration_context
    from llmcompressor.modifiers import Modifier
    from llmcompressor.pipelines import CalibrationPipeline
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger as loguru_logger


def oneshot(lm: LM, run: Run, name: str, recipe: Sequence[Modifier], batches: Sequence[torch.Tensor] = ()) -> None:
    """Applies the modifiers of `recipe` together; the linear layers then have the dequantized weights.

    With `batches` [rows, T] of token ids, every block receives the outputs of the quantized blocks before it.

    Raises:
        UserError: a layer's weights are not finite afterwards, its Hessian cannot be inverted, or its outputs are NaN.
    """
    model, blocks = lm.model, decoder_blocks(lm.model)
    stored = model.dtype
    computed = compute_dtype(model, run) if batches else stored
    indices = {block: index for index, block in enumerate(blocks)}
    logger.info(f"{name}: {len(blocks)} blocks; the library cannot go on in the middle: an interrupted run starts over")

    def finish_block(modules: Sequence[nn.Module]) -> None:
        _check_none_skipped(recipe, set(modules), name)
        for block in (m for m in modules if m in indices):
            with disable_offloading(), torch.no_grad():
                _round_block(block, name, indices[block], stored)
            logger.info(f"{name}: block {indices[block] + 1} of {len(blocks)}")

    # the batches are used unchanged: no sampler, no collation, no padding and so no attention mask
    rows: Any = [{"input_ids": batch} for batch in batches]
    loader = DataLoader(rows, batch_size=None) if batches else None
    arguments = DatasetArguments(sequential_targets=[type(blocks[0]).__name__])
    cast_weights(model, computed)  # the whole model, since the library moves blocks to the device without casting
    with silent(), on_device(run.device), plain_norms(model), dispatch_removed(model), create_session() as session:
        session.initialize(model=model, start=-1, recipe=[*recipe, _AfterBlock(act=finish_block)], calib_data=loader)
        pipeline = CalibrationPipeline.from_modifiers(session.lifecycle.recipe.modifiers)
        pipeline(model, loader, arguments)
        session.finalize()
    cast_weights(model, stored)
    linear: Any
    for linear in linears(model).values():
        linear.quantization_status = QuantizationStatus.DECOMPRESSED  # as after loading: the forward rounds no weights


class _AfterBlock(Modifier):
    """The last modifier of a recipe: calls `act` with the modules of each part of the model that the others have finished."""

    act: Callable[[Sequence[nn.Module]], None]

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_sequential_epoch_end(self, state: Any, event: Any, modules: list[nn.Module], **kwargs: Any) -> None:
        self.act(modules)


def _round_block(block: nn.Module, name: str, index: int, stored: torch.dtype) -> None:
    """Rounds the weights of a block to the grid of their scales; GPTQ's weights are on it already.

    Weights and scales are rounded to the type that they will be `stored` in.
    """
    linear: Any
    for path, linear in block.named_modules():
        if getattr(linear, "quantization_scheme", None) is None:
            continue
        weight, scale = linear.weight.data, linear.weight_scale.data
        if not (weight.isfinite().all() and scale.isfinite().all()):  # integers would hide NaN
            raise UserError(
                f"{name}: {path} of block {index} is not finite any more; calibrate on text that the model knows "
                f"(calibration.source), or load it with model.dtype=float32"
            )
        scale = scale.to(stored)
        _, rounded = round_to_grid(weight.to(stored), scale, linear.quantization_scheme.weights)
        update_offload_parameter(linear, "weight_scale", scale.to(linear.weight_scale.dtype))
        update_offload_parameter(linear, "weight", rounded.to(weight.dtype))


def _check_none_skipped(recipe: Sequence[Modifier], done: set[nn.Module], name: str) -> None:
    """Raises UserError where the library only warns: GPTQ rounds to nearest if a Hessian is not positive definite, and AWQ
    skips layers whose outputs are NaN."""
    for modifier in recipe:
        for path in getattr(modifier, "_rtn_fallback_module_names", []):
            raise UserError(
                f"{name}: the Hessian of {path} could not be inverted; raise method.{name}.damping or calibration.samples"
            )
        scaled = {metric["layer_name"] for metric in getattr(modifier, "_error_metrics", [])}
        for mapping in getattr(modifier, "_resolved_mappings", []):
            if mapping.smooth_layer in done and mapping.smooth_name not in scaled:
                raise UserError(
                    f"{name}: {mapping.parent_name} puts out NaN or nothing on the calibration text; take other text "
                    f"(calibration.source), or load the model with model.dtype=float32"
                )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Hides the library's progress bars, messages and warnings."""
    import tqdm.std

    bar = tqdm.std.tqdm.__init__
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    level = tracing.level

    def hidden_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        bar(self, *args, **{**kwargs, "disable": True})

    loguru_logger.disable("llmcompressor")
    loguru_logger.disable("compressed_tensors")
    tracing.setLevel(logging.ERROR)
    try:
        with quiet(), mock.patch.object(tqdm.std.tqdm, "__init__", hidden_bar):
            yield
    finally:
        tracing.setLevel(level)
        loguru_logger.enable("llmcompressor")
        loguru_logger.enable("compressed_tensors")


@contextlib.contextmanager
def on_device(name: str) -> Iterator[None]:
    """Makes the library use the device that the user chose, and pin memory only if an accelerator is available."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with contextlib.ExitStack() as stack:
        for pipeline in (data_free, sequential):
            stack.enter_context(mock.patch.object(pipeline, "get_main_device", lambda: device))
        if not torch.accelerator.is_available():
            stack.enter_context(
                mock.patch.object(IntermediatesCache, "_pin_intermediate", staticmethod(lambda value: None))
            )
        yield


@contextlib.contextmanager
def dispatch_removed(model: nn.Module) -> Iterator[None]:
    """Removes, on exit, the library's hooks that move each module's weights to the device; the weights stay in main memory."""
    with_own_forward = {module for module in model.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        remove_dispatch(model)
        for module in model.modules():  # the library leaves a forward on every module; only quantized layers need it
            if module not in with_own_forward and getattr(module, "quantization_scheme", None) is None:
                vars(module).pop("forward", None)


@contextlib.contextmanager
def plain_norms(model: nn.Module) -> Iterator[None]:
    """Replaces norms that multiply by 1 + weight (Gemma) by norms that multiply by their weight, to fold scales into it.

    The library's replacements store 1 + weight in the model's type, which rounds every norm. Here they store it in single
    precision, and a norm without folded scales gets its original weight back.
    """
    originals = dict(model.named_modules())
    with norm_calibration_context(model):
        replacements = {n: m for n, m in model.named_modules() if isinstance(m, NormCalibrationModule)}
        before = {n: originals[n].weight.data.clone() for n in replacements}  # type: ignore[operator]
        for name, module in replacements.items():
            module.weight.data = 1 + before[name].float()
        yield
    for name, module in replacements.items():
        if torch.equal(module.weight.data, 1 + before[name].float()):
            originals[name].weight.data = before[name]
