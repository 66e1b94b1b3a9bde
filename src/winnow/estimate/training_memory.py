"""Computes the memory of a training from shapes: weights, gradients, moments, and the tensors that the backward pass needs.

The forecast of a stage (`winnow.estimate.cost`) and the check before a training (`winnow.training.preflight`) both use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.model.spec import ModelSpec

LOGITS_BYTES = 128 * 2**20  # of the chunk of single-precision logits that the losses compute at a time
# Measured. glibc keeps freed blocks below 32 MB. What a forward pass frees between the tensors that it saves for the backward pass
# becomes holes: this share of the tensors saved in smaller blocks, by bytes of an activation element.
_FRAGMENTATION = {2: 0.85, 4: 1.2}
_ADAPTER_FRAGMENTATION = {2: 0.85, 4: 0.6}  # an adapter update frees less (`winnow.training.low_rank`)
_HEAP_BLOCK = 32 * 2**20


@dataclass(frozen=True)
class TrainingMemory:
    """The memory that a training takes on one device.

    Attributes:
        spec: the model's dimensions.
        weights_bytes: all parameters and buffers, as they are stored.
        trainable_parameters: number of parameters that need a gradient.
        cast_parameters: number of parameters that are cast to 16 bits for matrix products.
        gathered_bytes: the largest block and everything outside the blocks, which FSDP gathers whole.
        other_models_bytes: other models that take part, such as a teacher.
        mixed: whether matrix products are in 16 bits.
        adapters: whether only adapters are trained.
    """

    spec: ModelSpec
    weights_bytes: int
    trainable_parameters: int
    cast_parameters: int = 0
    gathered_bytes: int = 0
    other_models_bytes: int = 0
    mixed: bool = True
    adapters: bool = True
    on_cpu: bool = False

    @property
    def moments_bytes(self) -> int:
        """The bytes of the optimizer's two moments of each trained parameter."""
        return 8 * self.trainable_parameters

    @property
    def states_bytes(self) -> int:
        """The bytes of the gradient and the two moments of each trained parameter."""
        return 4 * self.trainable_parameters + self.moments_bytes

    def saved_bytes(self, tokens: int, checkpointing: bool = False, shards: int = 1) -> float:
        """Returns the bytes that the backward pass of `tokens` tokens needs: activations, the loss, 16-bit copies of weights."""
        return sum(self._saved_parts(tokens, checkpointing, shards))

    def fragmentation_bytes(self, tokens: int, checkpointing: bool = False, shards: int = 1) -> float:
        """Returns the bytes of a processor's memory between the saved tensors that malloc cannot use."""
        copies, layers, loss = self._saved_parts(tokens, checkpointing, shards)
        in_heap = copies + layers + (loss if loss <= _HEAP_BLOCK else 0)
        return (_ADAPTER_FRAGMENTATION if self.adapters else _FRAGMENTATION)[2 if self.mixed else 4] * in_heap

    def needed_bytes(self, tokens: int, checkpointing: bool = False, shards: int = 1) -> int:
        """Returns the bytes on each of `shards` devices with `tokens` tokens on it at a time."""
        weights = float(self.weights_bytes)
        if shards > 1:
            gathered = self.gathered_bytes * (1.5 if self.mixed else 1.0)
            weights = max(self.weights_bytes, 4 * self.spec.parameters) / shards + gathered
        saved = self.saved_bytes(tokens, checkpointing, shards)
        holes = self.fragmentation_bytes(tokens, checkpointing, shards) if self.on_cpu else 0.0
        return math.ceil(weights + self.other_models_bytes + self.states_bytes / shards + saved + holes)

    def _saved_parts(self, tokens: int, checkpointing: bool, shards: int) -> tuple[float, float, float]:
        """Returns the bytes of the copies of weights, which a sharded training does not keep, of the layers and of the loss."""
        copies = 2 * self.cast_parameters if shards == 1 else 0
        return copies, *_activation_bytes(self.spec, tokens, self.mixed, self.adapters, checkpointing)


def _activation_bytes(
    spec: ModelSpec, tokens: int, mixed: bool, adapters: bool, checkpointing: bool = False
) -> tuple[float, float]:
    """Returns the bytes that the backward pass of `tokens` tokens needs: those of the layers, and those of the loss.

    Each layer saves the inputs of both norms in single precision, the inputs of the linear layers (and once more those of
    adapters), queries, keys, values and the attention output, gate, up, their activation and product. With `checkpointing`, one
    layer at a time saves all of that, and every layer its input. The loss computes the logits of one chunk of positions at a time,
    three times over in single precision from the product to their gradient (`winnow.training.losses`), and saves a gradient as
    large as the hidden states.
    """
    element_bytes = 2 if mixed else 4
    attention = spec.heads * spec.head_dim
    # Casting copies the norm's output for each linear layer; otherwise the layers share it.
    norm_outputs = 5 if mixed and adapters else 2
    layer_bytes = (
        (8 + element_bytes * norm_outputs) * spec.hidden_size
        + 5 * element_bytes * attention
        + 4 * element_bytes * spec.intermediate_size
    )
    saved_per_token = layer_bytes + spec.layers * 4 * spec.hidden_size if checkpointing else spec.layers * layer_bytes
    logits = min(4 * tokens * spec.vocab_size, max(LOGITS_BYTES, 4 * spec.vocab_size)) * (14 if mixed else 12) / 4
    return tokens * saved_per_token, logits + tokens * 3 * 4 * spec.hidden_size
