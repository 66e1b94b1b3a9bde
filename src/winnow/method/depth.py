"""Depth pruning removes whole decoder layers; the artifact is an ordinary, shallower model.

python compress.py method=[depth] method.depth.share=0.25
python compress.py method=[depth,lora] method.depth.by=perplexity
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout, TensorLayout
    from winnow.method.blocks import ExtraArgs

logger = logging.getLogger(__name__)

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")  # lists in configurations with an entry for each layer


@dataclass(frozen=True)
class Depth(BaseStage):
    """Drops the `share` of the decoder layers that matters least; those that are kept stay bit for bit as they were.

    By `influence`, a layer matters as much as it turns its input: 1 - mean cosine similarity between the hidden states that
    enter and leave it, all layers scored in one pass. By `perplexity`, layers go one after the other, each time the one
    without which the calibration loss is lowest, all others scored again after each.

    The number to drop is rounded, at least one, and at least one layer is kept. Lists with an entry a layer in the
    configuration (Gemma-3's sliding and full attention, Qwen2's windows) lose the entries of the layers that go.

    Source: influence: ShortGPT, arXiv:2403.03853, eq. 1; perplexity: Shortened LLaMA, arXiv:2402.02834, section 3.1, there
        in one shot, here greedily.
    Calibration: texts; the hidden states of all their tokens (influence), or the next-token loss of their answers, of whole
        texts where there is no question (perplexity).
    Cost: N / L parameters of the L layers at a time on the device, and the hidden states of the T calibration tokens in main
        memory (from the code). influence: two forwards over them. perplexity: L / 2 forwards for each layer that goes, L + 1
        times the hidden states, and the head on the device: for large models take few short texts (the paper: 10 of 128
        tokens). Measured on the embedded model, 64 texts, one core: 2 s and 5 s a layer.
    Writes: dense safetensors of the model's own architecture, with fewer layers.
    Loaded by: transformers; vLLM; llama.cpp by method=[depth,gguf].
    """

    slot: ClassVar[Slot] = Slot.PRUNE
    matrices: ClassVar[tuple[str, ...] | None] = None
    perplexity_bound: ClassVar[float] = 1.1
    aggressive: ClassVar[Mapping[str, Any]] = {"share": 0.75}

    share: float = knob(0.2, low=0.02, high=0.75, search_range=(0.1, 0.5))
    by: str = knob("influence", choices=("influence", "perplexity"))

    def predict(self, plan: ModelLayout) -> ModelLayout:
        # only calibration data decides which layers go, but all layers have the same size
        layers = plan.config.num_hidden_layers
        from winnow.model.layers import final_norm
        from winnow.model.spec import build_on_meta

        check_alike(plan.tensors.values(), plan.spec.name, "depth")
        if self.by == "perplexity":
            final_norm(build_on_meta(plan.config))  # raises UserError for models without one
        return plan.reshaped(config_of_layers(plan.config, range(self.remaining_layers(layers))))

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost, count_tokens

        data, layers = count_tokens(calibration), plan.spec.layers
        if self.by == "influence":
            return StageCost.calibrated(plan, calibration)
        # hidden states of each candidate
        states = StageCost(host_bytes=plan.element_bytes * layers * data.tokens * plan.spec.hidden_size)
        return StageCost.calibrated(plan, calibration, passes=self._dropped(layers) * layers / 2) + states

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.data.calibration import calibration_batches
        from winnow.method import calibration_statistics
        from winnow.model.layers import decoder_blocks
        from winnow.model.reshape import rebuild_model

        blocks = decoder_blocks(lm.model)
        count = self._dropped(len(blocks))
        batches, digest = calibration_batches(lm, run)
        if self.by == "influence":
            influences = calibration_statistics.cached_statistics(
                lm.model, run, "influence", (digest,), lambda: {"blocks": block_influences(lm.model, batches, run)}
            )
            scores = influences["blocks"].tolist()
            dropped = sorted(range(len(blocks)), key=lambda index: (scores[index], index))[:count]
        else:
            dropped = drop_greedily(lm.model, batches, answer_starts(lm, run), count, run)
        remaining = [index for index in range(len(blocks)) if index not in dropped]
        logger.info(f"depth: without layers {', '.join(map(str, sorted(dropped)))} of 0 to {len(blocks) - 1}")
        config = config_of_layers(lm.model.config, remaining)
        for index in sorted(dropped, reverse=True):
            del blocks[index]
        notes = {"calibration_sha256": digest, "dropped_layers": sorted(dropped)}
        return StageResult(lm.with_model(rebuild_model(lm.model, config)), notes)

    def remaining_layers(self, layers: int) -> int:
        """Returns how many of `layers` layers remain."""
        return layers - self._dropped(layers)

    def _dropped(self, layers: int) -> int:
        if layers < 2:
            raise UserError(f"method.depth.share={self.share}: the model has one layer only; leave method=[depth] out")
        return min(max(round(self.share * layers), 1), layers - 1)


def check_alike(tensors: Iterable[TensorLayout], architecture: str, method: str) -> None:
    """Refuses models whose blocks differ in kind, as an architecture derives a block's kind from its position.

    Raises:
        UserError: a block has tensors of other shapes than the first (the first blocks of DeepSeek have no experts).
    """
    shapes: dict[int, Counter[tuple[int, ...]]] = {}
    for tensor in tensors:
        if tensor.block is not None:
            shapes.setdefault(tensor.block, Counter())[tensor.shape] += 1
    different = [index for index, counts in shapes.items() if counts != shapes[0]]
    if different:
        raise UserError(
            f"method=[{method}]: the blocks of {architecture} differ (block {different[0]} from the first), so that none can be "
            f"left out; take a method that leaves their number as it is"
        )


def config_of_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Returns the configuration of the same model with only the given `layers`, in ascending order.

    Raises:
        UserError: layers depend on one another.
    """
    from winnow.model.reshape import edit_config

    if getattr(config, "num_kv_shared_layers", None):
        raise UserError("method=[depth]: layers of this model share keys and values with others; none can be left out")
    changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for name in PER_LAYER:
        if getattr(config, name, None) is not None:
            changes[name] = [getattr(config, name)[index] for index in layers]
    if getattr(config, "max_window_layers", None) is not None:  # layers before this one have full attention
        changes["max_window_layers"] = sum(index < config.max_window_layers for index in layers)
    return edit_config(config, **changes)


def block_influences(model: PreTrainedModel, batches: Sequence[torch.Tensor], run: Run) -> torch.Tensor:
    """Returns for each block 1 - the mean over all tokens of the cosine between its input and output (ShortGPT, eq. 1)."""
    import torch
    import torch.nn.functional as F

    from winnow.method.blocks import iterate_blocks
    from winnow.model.layers import decoder_blocks

    count = len(decoder_blocks(model))
    tokens = sum(batch.numel() for batch in batches)
    influences = []
    for index, block, run_calibration in iterate_blocks(model, batches, run):
        cosines: list[float] = []

        def compare(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            cosines: list[float] = cosines,
        ) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # [rows, T, hidden]
            after = output[0] if isinstance(output, tuple) else output
            cosines.append(F.cosine_similarity(before.double(), after.double(), dim=-1).sum().item())

        handle = block.register_forward_hook(compare, with_kwargs=True)
        try:
            run_calibration()
        finally:
            handle.remove()
        influences.append(1 - sum(cosines) / tokens)
        logger.info(f"depth: block {index + 1} of {count}, influence {influences[-1]:.4f}")
    return torch.tensor(influences, dtype=torch.float64)


def answer_starts(lm: LM, run: Run) -> list[int]:
    """Returns for each row of the calibration batches, in order, the first position that the loss counts."""
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode

    rows = encode(
        documents(run.calibration, run.calibration.samples, run.seed), lm.tokenizer, run.calibration.max_length
    )
    return [row.answer_start for row in sorted(rows, key=lambda row: len(row.ids))]  # the order of the batches


def drop_greedily(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], starts: Sequence[int], count: int, run: Run
) -> list[int]:
    """Returns the `count` blocks to drop, chosen greedily: each time the block without which the loss is lowest."""
    from winnow.model.layers import decoder_blocks

    dropped: list[int] = []
    for step in range(count):
        losses = losses_without(model, batches, starts, dropped, run)
        best = min(losses, key=lambda index: (losses[index], index))
        dropped.append(best)
        layers = len(decoder_blocks(model))
        logger.info(f"depth: {step + 1} of {count}: without layer {best} of {layers} the loss is {losses[best]:.4f}")
    return dropped


def losses_without(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    starts: Sequence[int],
    dropped: Sequence[int],
    run: Run,
) -> dict[int, float]:
    """Returns the mean next-token loss without the blocks `dropped` and one more, by the index of that one.

    All candidates pass through the blocks together, so that each block moves to the device once.
    """
    import torch

    from winnow.method.blocks import block_inputs, block_on_device, cast_outside_blocks, compute_dtype
    from winnow.model.layers import decoder_blocks

    blocks, device, dtype = decoder_blocks(model), run.device, compute_dtype(model, run)
    home = next(model.parameters()).device
    with torch.no_grad():
        unpruned, extra_args = block_inputs(model, blocks, [batch.to(home) for batch in batches], dtype)
        without: dict[int, list[torch.Tensor]] = {}  # hidden states for each candidate, by batch
        for index, block in enumerate(blocks):
            if index in dropped:
                continue
            with block_on_device(block, device, dtype):
                without = {
                    candidate: _through(block, state, extra_args[index], device) for candidate, state in without.items()
                }
                without[index], unpruned = unpruned, _through(block, unpruned, extra_args[index], device)
        with cast_outside_blocks(model, dtype):
            return {index: mean_loss(model, state, batches, starts, device) for index, state in sorted(without.items())}


def _through(
    block: nn.Module, states: Sequence[torch.Tensor], extra_args: Sequence[ExtraArgs], device: str
) -> list[torch.Tensor]:
    """Returns the block's outputs for `states`, on the device where `states` are."""
    from winnow.method.blocks import block_outputs

    return [output.to(states[0].device) for output in block_outputs(block, states, extra_args, device)]


def mean_loss(
    model: PreTrainedModel,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[torch.Tensor],
    starts: Sequence[int],
    device: str,
) -> float:
    """Returns the mean loss of the tokens from each row's start on.

    `hidden` [rows, T, hidden] are the outputs of the last block for `batches`.

    Raises:
        UserError: no row reaches its start.
    """
    import torch.nn.functional as F
    from transformers.modeling_outputs import MoeModelOutputWithPast

    from winnow.model.layers import final_norm

    home = hidden[0].device
    norm, head, base = final_norm(model).to(device), model.get_output_embeddings().to(device), model.base_model
    states = [row for batch in hidden for row in batch.split(1)]
    rows = [row for batch in batches for row in batch.split(1)]
    total, tokens = 0.0, 0
    try:
        for state, ids, start in zip(states, rows, starts, strict=True):
            # this class has the fields of all model outputs
            out = MoeModelOutputWithPast(last_hidden_state=norm(state.to(device)))
            base.forward = lambda *args, out=out, **kwargs: out  # the model applies its own head, caps and scales
            logits = model(input_ids=ids.to(device)).logits[0, start - 1 : -1].float()
            total += F.cross_entropy(logits, ids[0, start:].to(device), reduction="sum").item()
            tokens += len(logits)
    finally:
        del base.forward
        norm.to(home)
        head.to(home)
    if not tokens:
        raise UserError(
            "method.depth.by=perplexity: every calibration text is cut before its answer; raise "
            "calibration.max_length, or take method.depth.by=influence"
        )
    return total / tokens
