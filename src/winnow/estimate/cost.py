"""What a stage costs, from shapes alone: operations, traffic, and memory beyond the weights that it changes.

A stage says so with `work(plan, calibration) -> Work`, put together from the pieces below: `+` joins what is held at the same
time, `then` what comes one after the other. Each formula follows the code that it is about; nothing is fitted but where a
constant says so. `winnow.estimate.machine` turns it into seconds.

    Work.calibrated(plan, calibration).then(Work.hessians(plan, calibration) + Work.solved(plan)).then(Work.packed(plan))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.types import Calibration

if TYPE_CHECKING:
    from winnow.estimate.layout import ModelLayout, TensorLayout
    from winnow.model.spec import ModelSpec

BATCH_TOKENS = 4096  # of a calibration batch at most, where it has not been counted
# Measured. glibc keeps freed blocks below 32 MB, and what a forward pass throws away between what it keeps for the backward
# pass is holes: this share of what is kept in smaller blocks, by bytes of an activation.
_HOLES = {2: 0.85, 4: 1.2}
_ADAPTER_HOLES = {2: 0.85, 4: 0.6}  # an update throws away less (`winnow.training.low_rank`)
_HEAP_BLOCK = 32 * 2**20
LOGITS_BYTES = 128 * 2**20  # of a chunk of logits in single precision, as the losses make them
_TEXT_BYTES = 200  # measured, of a token while documents are tokenised and as a list


@dataclass(frozen=True)
class Counted(Calibration):
    """Calibration whose texts have been tokenised.

    Attributes:
        tokens: of all texts.
        shapes: different shapes [rows, T] of its batches.
        batch_tokens: of the largest batch.
    """

    tokens: int = 0
    shapes: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class Countable(Calibration):
    """Calibration whose texts are tokenised when a stage asks, and not at all for stages without calibration."""

    count: Callable[[], Counted] | None = None


def counted(calibration: Calibration) -> Counted:
    """As counted, or what the texts come to at most: each as long as it may be, of one shape."""
    if isinstance(calibration, Counted):
        return calibration
    if isinstance(calibration, Countable) and calibration.count is not None:
        return calibration.count()
    tokens = calibration.samples * calibration.max_length
    known = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(Calibration)}
    return Counted(**known, tokens=tokens, shapes=1, batch_tokens=min(tokens, BATCH_TOKENS))


@dataclass(frozen=True)
class StageCost:
    """What is done and held.

    Attributes:
        flops: floating-point operations on the device.
        traffic_bytes: read and written, for work that does little with each number.
        sorted_weights: that are put in order.
        host_bytes: held in main memory beyond the weights as they came, wherever the work is done.
        device_bytes: held where the work is done, beyond the weights that lie there.
        fragmentation_bytes: that malloc of a processor's memory leaves between blocks in use, and cannot use itself.
        moved_bytes: weights that lie on the device at a time; a processor has them in main memory anyway.
        matmuls: matrix products of different shapes; on processors oneDNN keeps a compiled kernel for each.
    """

    flops: float = 0.0
    traffic_bytes: float = 0.0
    sorted_weights: float = 0.0
    host_bytes: float = 0.0
    device_bytes: float = 0.0
    fragmentation_bytes: float = 0.0
    moved_bytes: float = 0.0
    matmuls: int = 0

    def __add__(self, other: StageCost) -> StageCost:
        """Both, held at the same time."""
        return StageCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def then(self, other: StageCost) -> StageCost:
        """One after the other: the larger of what they hold."""
        held = ("host_bytes", "device_bytes", "fragmentation_bytes", "moved_bytes")
        both = self + other
        return dataclasses.replace(both, **{name: max(getattr(self, name), getattr(other, name)) for name in held})

    def times(self, count: float) -> StageCost:
        """The same work `count` times, one after the other."""
        return dataclasses.replace(
            self,
            flops=self.flops * count,
            traffic_bytes=self.traffic_bytes * count,
            sorted_weights=self.sorted_weights * count,
        )

    @staticmethod
    def streamed(plan: ModelLayout) -> StageCost:
        """Every linear weight read and written once in main memory, a matrix at a time, in single precision."""
        return StageCost(traffic_bytes=2 * _bytes(plan.linears), host_bytes=8 * _largest(plan.linears))

    @staticmethod
    def sorted(plan: ModelLayout) -> StageCost:
        """Scores of every linear weight put in order, a matrix at a time: scores, their order and its copy, a mask."""
        return StageCost(
            sorted_weights=plan.linear_parameters,
            device_bytes=(4 + 4 + 8 + 8 + 1) * _largest(plan.linears),
            moved_bytes=_bytes(plan.largest_block),
        )

    @staticmethod
    def selected(plan: ModelLayout) -> StageCost:
        """The smallest scores of every linear weight matrix found without ordering them all (`torch.kthvalue`)."""
        return dataclasses.replace(StageCost.sorted(plan), sorted_weights=plan.linear_parameters / 8)

    @staticmethod
    def packed(plan: ModelLayout) -> StageCost:
        """New weights on a grid (`packing.quantize_linear`) with an 8-bit integer each, packed a matrix at a time.

        They come on top of the old ones, which stay mapped from their file as long as one tensor of it is in use.
        """
        return StageCost(
            traffic_bytes=4 * _bytes(plan.linears) + 8 * plan.linear_parameters,
            host_bytes=_bytes(plan.linears) + plan.linear_parameters + 12 * _largest(plan.linears),
        )

    @staticmethod
    def reloaded(plan: ModelLayout, bits: float) -> StageCost:
        """The model written to a scratch file and read back by a library that narrows the linear weights to `bits`.

        Beside the base: the scratch file, mapped, the weights as read from it, and the narrowed ones.
        """
        read = _bytes(plan.linears)
        narrowed = plan.linear_parameters * bits / 8
        return StageCost(
            traffic_bytes=4 * plan.memory_bytes + 2 * read,
            host_bytes=plan.memory_bytes + read,
            device_bytes=narrowed,
            moved_bytes=plan.memory_bytes - read,
        )

    @staticmethod
    def calibrated(plan: ModelLayout, calibration: Calibration, passes: float = 2) -> StageCost:
        """All calibration tokens through every block `passes` times, a block on the device at a time.

        `walk_blocks` with one replay takes two: one to look at the inputs, one for the inputs of the next block. It holds the
        inputs of a block, and what all blocks are called with (rotary embeddings).
        """
        seen = counted(calibration)
        n, width = plan.spec, plan.element_bytes
        states = seen.tokens * n.hidden_size * width
        inputs = seen.tokens * (16 + 2 * n.head_dim * width)
        attention = 4 * _mean_length(seen) * seen.tokens * n.heads * n.head_dim * n.layers
        return StageCost(
            flops=passes * (2 * seen.tokens * plan.linear_parameters + attention),
            traffic_bytes=2 * passes * states * n.layers,
            host_bytes=states + inputs + _widened(plan.outside_blocks, plan),
            device_bytes=seen.batch_tokens * _widest(plan) * width + _widened(plan.largest_block, plan),
            moved_bytes=_bytes(plan.largest_block),
            matmuls=seen.shapes * _kinds(plan),
        )

    @staticmethod
    def widened(plan: ModelLayout) -> StageCost:
        """All weights once more in single precision, for a library that cannot widen them a block at a time."""
        return StageCost(host_bytes=_widened(list(plan.tensors.values()), plan))

    @staticmethod
    def hessians(plan: ModelLayout, calibration: Calibration) -> StageCost:
        """X^T X in single precision of the inputs of every linear layer, those of one block held at a time."""
        seen = counted(calibration)
        block = [t for t in plan.largest_block if t.linear]
        return StageCost(
            flops=2 * seen.tokens * sum(t.shape[1] ** 2 for t in plan.linears),
            device_bytes=4 * sum(t.shape[1] ** 2 for t in block) + 4 * seen.batch_tokens * _inputs(block),
            moved_bytes=_bytes(plan.largest_block),
        )

    @staticmethod
    def solved(plan: ModelLayout) -> StageCost:
        """The error of every column spread over those that follow (GPTQ, SparseGPT), a matrix at a time.

        Cholesky, inverse and Cholesky of its matrix [in, in] take in^3 / 3 + in^3 + in^3 / 3, the spreading out * in^2.
        """
        return StageCost(
            flops=sum(5 / 3 * t.shape[1] ** 3 + t.shape[0] * t.shape[1] ** 2 for t in plan.linears),
            device_bytes=max((12 * t.shape[1] ** 2 + 12 * t.numel for t in plan.linears), default=0),
            moved_bytes=_bytes(plan.largest_block),
        )

    @staticmethod
    def trained(
        plan: ModelLayout,
        calibration: Calibration,
        steps: int,
        batch_tokens: int,
        trained_parameters: int,
        documents: int,
        mixed: bool = True,
        adapters: bool = True,
        frozen: bool = False,
        masked: bool = False,
        device_tokens: int = 0,
    ) -> StageCost:
        """`steps` optimizer steps of `batch_tokens` tokens; the whole model on the device, its weights in single precision.

        Keeps what the backward pass of `device_tokens` tokens needs (0: of all tokens of a step): see `activations`. A
        trained parameter has a gradient and two moments. `mixed`: products in 16 bits, for which the linear weights are
        copied, and kept as frozen ones' are for the inputs' gradient. `frozen`: the model stays as it is stored,
        and quantized weights are unpacked a matrix at a time. `masked`: the updates of pruned matrices are made whole.
        """
        n = plan.spec
        parameters = sum(t.numel for t in plan.tensors.values())
        copies = 2 * (plan.linear_parameters + n.vocab_size * n.hidden_size) if mixed and not frozen else 0
        seen = counted(calibration)
        layers, logits = activations(n, min(device_tokens or batch_tokens, batch_tokens), mixed, adapters)
        kept = copies + layers + logits
        in_heap = kept - (logits if logits > _HEAP_BLOCK else 0)
        masks = 4 * plan.linear_parameters if masked else 0
        held = max(plan.memory_bytes, plan.served_bytes) if frozen else 4 * parameters
        # forward, the inputs' gradient, and for what is trained the weights' gradient
        flops = 2 * batch_tokens * (2 * parameters + trained_parameters)
        in_single = held - plan.memory_bytes
        unpacked = 4 * _largest(plan.linears) if frozen else 0  # in 16 bits, for a product and for its gradient
        return StageCost(
            flops=steps * flops,
            traffic_bytes=16 * parameters,
            host_bytes=in_single + _TEXT_BYTES * documents * _mean_length(seen),
            device_bytes=(16 if frozen else 12) * trained_parameters + masks + kept + unpacked,
            fragmentation_bytes=heap_holes(in_heap, mixed, adapters),
            moved_bytes=held,
            matmuls=min(steps, 2 * seen.shapes) * 3 * (_kinds(plan) * (3 if adapters else 1) + 1),
        )


def heap_holes(kept: float, mixed: bool, adapters: bool) -> float:
    """Bytes that malloc cannot use between those that are kept for the backward pass."""
    return (_ADAPTER_HOLES if adapters else _HOLES)[2 if mixed else 4] * kept


def activations(
    n: ModelSpec, tokens: int, mixed: bool, adapters: bool, checkpointing: bool = False
) -> tuple[float, float]:
    """Bytes that the backward pass of `tokens` tokens needs: of the layers, and of the loss.

    For every layer the inputs of both norms in single precision, the inputs of the linear layers (and those of adapters once
    more), queries, keys, values and output of attention, gate, up, their activation and product. With `checkpointing` all of
    that for one layer at a time, and the input alone for each. The loss makes the logits of one chunk of positions at a time,
    three times over in single precision, from the product to their gradient (`winnow.training.losses`), and keeps a gradient
    as large as the hidden states.
    """
    e = 2 if mixed else 4
    attention = n.heads * n.head_dim
    normed = 5 if mixed and adapters else 2  # casting makes a copy for every layer, else they share one
    layer = (8 + e * normed) * n.hidden_size + 5 * e * attention + 4 * e * n.intermediate_size
    kept = layer + n.layers * 4 * n.hidden_size if checkpointing else n.layers * layer
    logits = min(4 * tokens * n.vocab_size, max(LOGITS_BYTES, 4 * n.vocab_size)) * (14 if mixed else 12) / 4
    return tokens * kept, logits + tokens * 3 * 4 * n.hidden_size


def _bytes(tensors: list[TensorLayout]) -> int:
    return sum(t.memory_bytes for t in tensors)


def _largest(linears: list[TensorLayout]) -> int:
    return max((t.numel for t in linears), default=0)


def _inputs(linears: list[TensorLayout]) -> int:
    return max((t.shape[1] for t in linears), default=0)


def _widened(tensors: list[TensorLayout], plan: ModelLayout) -> int:
    """Bytes of these weights once more, in single precision, where they are stored in less and computed with in that."""
    return 4 * sum(t.numel for t in tensors) if plan.is_widened else 0


def _widest(plan: ModelLayout) -> int:
    """Elements for each token that a block holds at once while it computes."""
    n = plan.spec
    return 4 * n.hidden_size + n.heads * n.head_dim + 3 * n.intermediate_size


def _kinds(plan: ModelLayout) -> int:
    """Different shapes of the linear weights."""
    return len({t.shape for t in plan.linears})


def _mean_length(seen: Counted) -> float:
    return math.ceil(seen.tokens / max(1, seen.samples))
