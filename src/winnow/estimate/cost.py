"""Computes what a stage costs from shapes alone: operations, memory traffic, and memory beyond the weights that it changes.

A stage returns its cost from `work(plan, calibration) -> StageCost`, composed of the pieces below: `+` combines what is in memory
at the same time, `then` combines what happens in sequence. Each formula follows the code that it describes; nothing is fitted,
except where a constant says so. `winnow.estimate.machine` converts a cost to seconds.

    StageCost.calibrated(plan, calibration).then(
        StageCost.hessians(plan, calibration) + StageCost.solved(plan)
    ).then(StageCost.packed(plan))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.core.types import Calibration
from winnow.estimate.training_memory import TrainingMemory

if TYPE_CHECKING:
    from winnow.estimate.layout import ModelLayout, TensorLayout

BATCH_TOKENS = 4096  # maximum of a calibration batch whose tokens have not been counted
_TEXT_BYTES = 200  # measured, for each token of tokenised documents in lists


@dataclass(frozen=True)
class CountedCalibration(Calibration):
    """A calibration set whose texts have been tokenised.

    Attributes:
        tokens: tokens of all texts.
        shapes: number of distinct batch shapes [rows, T].
        batch_tokens: tokens of the largest batch.
    """

    tokens: int = 0
    shapes: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class CountableCalibration(Calibration):
    """A calibration set whose texts are tokenised when a stage needs the count, and never for stages without calibration."""

    count: Callable[[], CountedCalibration] | None = None


def count_tokens(calibration: Calibration) -> CountedCalibration:
    """Returns the counted calibration set, or an upper bound: every text at its maximum length, and one batch shape."""
    if isinstance(calibration, CountedCalibration):
        return calibration
    if isinstance(calibration, CountableCalibration) and calibration.count is not None:
        return calibration.count()
    tokens = calibration.samples * calibration.max_length
    fields = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(Calibration)}
    return CountedCalibration(**fields, tokens=tokens, shapes=1, batch_tokens=min(tokens, BATCH_TOKENS))


@dataclass(frozen=True)
class StageCost:
    """The work and the memory of a stage.

    Attributes:
        flops: floating-point operations on the device.
        traffic_bytes: bytes read and written by work that computes little with each number.
        sorted_weights: number of weights that are sorted.
        host_bytes: main memory beyond the weights as loaded, wherever the work is done.
        device_bytes: memory of the computing device, beyond the weights on it.
        fragmentation_bytes: processor memory between allocated blocks that malloc cannot use.
        moved_bytes: weights that are on the device at a time; a processor has them in main memory anyway.
        matmuls: matrix products of distinct shapes; on processors oneDNN caches a compiled kernel for each.
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
        """Returns the sum of two costs whose memory is in use at the same time."""
        return StageCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def then(self, other: StageCost) -> StageCost:
        """Returns the cost of one after the other: the work adds up, and the larger memory counts."""
        peak_fields = ("host_bytes", "device_bytes", "fragmentation_bytes", "moved_bytes")
        both = self + other
        return dataclasses.replace(
            both, **{name: max(getattr(self, name), getattr(other, name)) for name in peak_fields}
        )

    def times(self, count: float) -> StageCost:
        """Returns the cost of the same work done `count` times in sequence."""
        return dataclasses.replace(
            self,
            flops=self.flops * count,
            traffic_bytes=self.traffic_bytes * count,
            sorted_weights=self.sorted_weights * count,
        )

    @staticmethod
    def streamed(plan: ModelLayout) -> StageCost:
        """Returns the cost of reading and writing every linear weight once in single precision, a matrix at a time."""
        return StageCost(traffic_bytes=2 * _bytes(plan.linears), host_bytes=8 * _largest(plan.linears))

    @staticmethod
    def sorted(plan: ModelLayout) -> StageCost:
        """Returns the cost of sorting the scores of every linear weight, a matrix at a time.

        The memory holds the scores, their order and its copy, and a mask.
        """
        return StageCost(
            sorted_weights=plan.linear_parameters,
            device_bytes=(4 + 4 + 8 + 8 + 1) * _largest(plan.linears),
            moved_bytes=_bytes(plan.largest_block),
        )

    @staticmethod
    def selected(plan: ModelLayout) -> StageCost:
        """Returns the cost of selecting the smallest scores of every linear weight matrix unsorted (`torch.kthvalue`)."""
        return dataclasses.replace(StageCost.sorted(plan), sorted_weights=plan.linear_parameters / 8)

    @staticmethod
    def packed(plan: ModelLayout) -> StageCost:
        """Returns the cost of rounding weights to a grid (`packing.quantize_linear`) and packing them, a matrix at a time.

        Each new weight has an 8-bit integer. The new weights come on top of the old ones, which stay mapped from their file as
        long as one tensor of it is in use.
        """
        return StageCost(
            traffic_bytes=4 * _bytes(plan.linears) + 8 * plan.linear_parameters,
            host_bytes=_bytes(plan.linears) + plan.linear_parameters + 12 * _largest(plan.linears),
        )

    @staticmethod
    def reloaded(plan: ModelLayout, bits: float) -> StageCost:
        """Returns the cost of writing a scratch file and loading it by a library that quantizes linear weights to `bits`.

        Memory beside the base model: the mapped scratch file, the weights read from it, and the quantized ones.
        """
        linear_bytes = _bytes(plan.linears)
        narrowed = plan.linear_parameters * bits / 8
        return StageCost(
            traffic_bytes=4 * plan.memory_bytes + 2 * linear_bytes,
            host_bytes=plan.memory_bytes + linear_bytes,
            device_bytes=narrowed,
            moved_bytes=plan.memory_bytes - linear_bytes,
        )

    @staticmethod
    def calibrated(plan: ModelLayout, calibration: Calibration, passes: float = 2) -> StageCost:
        """Returns the cost of passing all calibration tokens through every block `passes` times, one block on the device.

        `iterate_blocks` with one calibration run makes two passes: one observes the inputs, one computes the inputs of the next
        block. It keeps the inputs of a block and the arguments that all blocks share (rotary embeddings).
        """
        counted = count_tokens(calibration)
        spec, width = plan.spec, plan.element_bytes
        states = counted.tokens * spec.hidden_size * width
        inputs = counted.tokens * (16 + 2 * spec.head_dim * width)
        attention = 4 * _mean_length(counted) * counted.tokens * spec.heads * spec.head_dim * spec.layers
        return StageCost(
            flops=passes * (2 * counted.tokens * plan.linear_parameters + attention),
            traffic_bytes=2 * passes * states * spec.layers,
            host_bytes=states + inputs + _widened(plan.outside_blocks, plan),
            device_bytes=counted.batch_tokens * _widest(plan) * width + _widened(plan.largest_block, plan),
            moved_bytes=_bytes(plan.largest_block),
            matmuls=counted.shapes * _distinct_shapes(plan),
        )

    @staticmethod
    def widened(plan: ModelLayout) -> StageCost:
        """Returns the cost of copying all weights to single precision, for a library that cannot do so a block at a time."""
        return StageCost(host_bytes=_widened(list(plan.tensors.values()), plan))

    @staticmethod
    def hessians(plan: ModelLayout, calibration: Calibration) -> StageCost:
        """Returns the cost of X^T X in single precision for the inputs of every linear layer, kept for one block at a time."""
        counted = count_tokens(calibration)
        block = [t for t in plan.largest_block if t.linear]
        return StageCost(
            flops=2 * counted.tokens * sum(t.shape[1] ** 2 for t in plan.linears),
            device_bytes=4 * sum(t.shape[1] ** 2 for t in block) + 4 * counted.batch_tokens * _inputs(block),
            moved_bytes=_bytes(plan.largest_block),
        )

    @staticmethod
    def solved(plan: ModelLayout) -> StageCost:
        """Returns the cost of distributing each column's error over the following columns (GPTQ, SparseGPT), a matrix at a time.

        Cholesky, inverse and Cholesky of the matrix [in, in] take in^3 / 3 + in^3 + in^3 / 3 operations, the updates out * in^2.
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
        """Returns the cost of `steps` optimizer steps of `batch_tokens` tokens, with the whole model in single precision.

        The model is on the device. The memory is that of `TrainingMemory` with `device_tokens` tokens (0: all tokens of a step).

        Args:
            mixed: products are in 16 bits, from copies of the linear weights that are kept for the gradients of inputs.
            frozen: the model stays as stored; quantized weights are unpacked a matrix at a time.
            masked: the low-rank updates of pruned matrices are materialised in full.
        """
        parameters = sum(t.numel for t in plan.tensors.values())
        counted = count_tokens(calibration)
        memory = TrainingMemory(
            plan.spec,
            weights_bytes=max(plan.memory_bytes, plan.served_bytes) if frozen else 4 * parameters,
            cast_parameters=plan.linear_parameters + plan.spec.vocab_size * plan.spec.hidden_size
            if mixed and not frozen
            else 0,
            trainable_parameters=trained_parameters,
            mixed=mixed,
            adapters=adapters,
        )
        tokens = min(device_tokens or batch_tokens, batch_tokens)
        own_weights = 4 * trained_parameters if adapters else 0  # which the weights of the model do not include
        masks = 4 * plan.linear_parameters if masked else 0
        # forward, gradients of inputs, and gradients of the trained weights
        flops = 2 * batch_tokens * (2 * parameters + trained_parameters)
        unpacked = 4 * _largest(plan.linears) if frozen else 0  # in 16 bits, for a product and its gradient
        return StageCost(
            flops=steps * flops,
            traffic_bytes=16 * parameters,
            host_bytes=memory.weights_bytes - plan.memory_bytes + _TEXT_BYTES * documents * _mean_length(counted),
            device_bytes=own_weights + memory.states_bytes + masks + memory.saved_bytes(tokens) + unpacked,
            fragmentation_bytes=memory.fragmentation_bytes(tokens),
            moved_bytes=memory.weights_bytes,
            matmuls=min(steps, 2 * counted.shapes) * 3 * (_distinct_shapes(plan) * (3 if adapters else 1) + 1),
        )


def _bytes(tensors: list[TensorLayout]) -> int:
    return sum(t.memory_bytes for t in tensors)


def _largest(linears: list[TensorLayout]) -> int:
    return max((t.numel for t in linears), default=0)


def _inputs(linears: list[TensorLayout]) -> int:
    return max((t.shape[1] for t in linears), default=0)


def _widened(tensors: list[TensorLayout], plan: ModelLayout) -> int:
    """Returns the bytes of a single-precision copy of these weights, if they are stored in less and computed with in it."""
    return 4 * sum(t.numel for t in tensors) if plan.is_widened else 0


def _widest(plan: ModelLayout) -> int:
    """Returns how many elements a block holds for each token while it computes."""
    spec = plan.spec
    return 4 * spec.hidden_size + spec.heads * spec.head_dim + 3 * spec.intermediate_size


def _distinct_shapes(plan: ModelLayout) -> int:
    """Returns the number of distinct shapes of the linear weights."""
    return len({t.shape for t in plan.linears})


def _mean_length(counted: CountedCalibration) -> float:
    return math.ceil(counted.tokens / max(1, counted.samples))
