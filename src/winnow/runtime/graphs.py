"""Decodes greedily from a CUDA graph: one decode step is captured once and replayed for every token.

A decode step of a small model launches a few hundred kernels of microseconds each. Launched one by one from Python they take 24 ms
on an H200 for 30 layers, whatever the model; replayed as one graph they take only the GPU's time. Nothing is compiled: capturing
costs a few decode steps, `torch.compile` half a minute.

A graph repeats fixed addresses, shapes and Python values. So the position is a tensor on the device, the KV cache has its full size
from the beginning, and nothing in a step may wait for the device. transformers' own static cache counts in Python where a layer
has a sliding window, and a replay would not advance that count. The layers here keep the keys and values of position p in slot
p modulo their size instead, which needs no branch. An ordinary forward pass reads the prompt.

    python evaluate.py hardware=h200 hardware.decode=graph
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

FULL, SLIDING = "full_attention", "sliding_attention"
WARM_UP_STEPS = 2  # steps before the capture, in which libraries create handles and Triton tunes its kernels
MASK_ALIGNMENT = 8  # scaled_dot_product_attention copies masks whose row length is not a multiple of this


def has_graphs(model: Any) -> bool:
    """Returns whether the model is on a device that supports graphs."""
    return bool(model.device.type == "cuda")


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer [batch, heads, size, width]; those of position p are in slot p modulo `size`.

    Args:
        size: number of slots: the length of the whole text, or of the layer's window where that is shorter.
        slot: the slot of the next token, an integer tensor [1] on the device, shared by the layers of one size.
    """

    is_compileable = True

    def __init__(self, size: int, slot: Tensor, sliding: bool) -> None:
        super().__init__()
        self.size, self.slot = size, slot
        self.is_sliding = sliding
        self.decoding = False  # False: the next input is a prompt

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.size, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.size, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.decoding:
            self.keys.index_copy_(2, self.slot, key_states)
            self.values.index_copy_(2, self.slot, value_states)
            return self.keys, self.values
        length = key_states.shape[-2]
        stored = min(length, self.size)
        slots = torch.arange(length - stored, length, device=key_states.device) % self.size
        self.keys.index_copy_(2, slots, key_states[:, :, -stored:])
        self.values.index_copy_(2, slots, value_states[:, :, -stored:])
        return key_states, value_states  # a prompt attends only to itself and needs no mask of empty slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # for prompts; masks are passed explicitly while decoding

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.size


class Decoder:
    """Answers prompts of one shape greedily, each with exactly `output_tokens`; end-of-text tokens are never chosen.

    The constructor reads the prompts once and captures the decode step. To answer, call `first`, then `rest`. Use it in
    `torch.inference_mode`, in which the step was captured.

    Attributes:
        tokens_bn: the answers [batch, output_tokens], once they are complete.
    """

    def __init__(self, model: Any, prompt_bt: Tensor, output_tokens: int) -> None:
        from winnow.model import adapter

        self._model = adapter.base_model(model)
        self.shape = (*prompt_bt.shape, output_tokens)
        batch, prompt_tokens, _ = self.shape
        text, device = self._model.config.get_text_config(decoder=True), prompt_bt.device
        layer_kinds, cache_settings = get_layer_types_and_kwargs(text)
        length = -(-(prompt_tokens + output_tokens) // MASK_ALIGNMENT) * MASK_ALIGNMENT
        window = min(length, int(cache_settings.get("sliding_window") or length))
        self._sizes = {FULL: length, SLIDING: window}
        forward_parameters = inspect.signature(self._model.forward).parameters
        self._logits_option = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters else {}
        self._masks_by_kind = hasattr(text, "layer_types")  # forward then takes a mask for each kind of layer
        self._kinds = sorted(set(layer_kinds))
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # position of the next input token
        self._generated_count = torch.zeros(1, dtype=torch.int64, device=device)  # tokens generated so far
        self._slot_by_kind = {kind: torch.zeros(1, dtype=torch.int64, device=device) for kind in self._kinds}
        self._token_b1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.tokens_bn = torch.zeros(batch, output_tokens, dtype=torch.int64, device=device)
        self._slot_indices = {kind: torch.arange(self._sizes[kind], device=device) for kind in self._kinds}
        self._penalty_v = end_of_text_penalty(self._model, device)
        self._layers = [SlotLayer(self._sizes[kind], self._slot_by_kind[kind], kind == SLIDING) for kind in layer_kinds]
        self._cache = Cache(layers=self._layers)
        self.first(prompt_bt)
        with self._model._optimize_model_for_decode():  # computes experts of a mixture as `generate` does
            self._replay = capture(self._step, self._rewind)

    def first(self, prompt_bt: Tensor) -> None:
        """Reads the prompts [batch, prompt_tokens] and chooses the first token; the previous answers are discarded."""
        for layer in self._layers:
            layer.decoding = False
        positions = torch.arange(prompt_bt.shape[1], device=prompt_bt.device)[None].expand_as(prompt_bt)
        logits_b1v = self._model(
            input_ids=prompt_bt,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._logits_option,
        ).logits
        for layer in self._layers:
            layer.decoding = True
        self._rewind()
        self._token_b1.copy_(self._choose(logits_b1v))
        self.tokens_bn[:, :1].copy_(self._token_b1)

    def rest(self) -> None:
        """Chooses all further tokens; an asynchronous device may still be computing them on return."""
        for _ in range(self.shape[-1] - 1):
            self._replay()

    def _rewind(self) -> None:
        """Resets to the position after the prompt; later slots are masked, so their contents do not matter."""
        self.position.fill_(self.shape[1])
        self._generated_count.fill_(1)

    def _step(self) -> None:
        """Reads one token and chooses the next one: the captured work. Nothing here may wait for the device."""
        for kind, slot in self._slot_by_kind.items():
            slot.copy_(self.position % self._sizes[kind])
        masks = {kind: self._mask(kind) for kind in self._kinds}
        logits_b1v = self._model(
            input_ids=self._token_b1,
            attention_mask=masks if self._masks_by_kind else next(iter(masks.values())),
            position_ids=self.position[None].expand_as(self._token_b1),
            past_key_values=self._cache,
            use_cache=True,
            **self._logits_option,
        ).logits
        self._token_b1.copy_(self._choose(logits_b1v))
        self.tokens_bn.index_copy_(1, self._generated_count, self._token_b1)
        self.position.add_(1)
        self._generated_count.add_(1)

    def _mask(self, kind: str) -> Tensor:
        """Returns the mask [batch, 1, 1, slots]: every slot up to the position is visible, and all slots once a window is full."""
        hidden = (self._slot_indices[kind] > self.position)[None, None, None].expand(self.shape[0], 1, 1, -1)
        if self._model.config._attn_implementation == "sdpa":
            return ~hidden
        dtype = self._model.dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)

    def _choose(self, logits_b1v: Tensor) -> Tensor:
        return (logits_b1v[:, -1].float() + self._penalty_v).argmax(-1, keepdim=True)


def end_of_text_penalty(model: Any, device: torch.device) -> Tensor:
    """Returns a penalty to add to logits [vocabulary]: minus infinity for end-of-text tokens, 0 for others."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    penalty = torch.zeros(int(model.config.get_text_config().vocab_size))
    penalty[[end for end in ends if 0 <= end < len(penalty)]] = -torch.inf
    return penalty.to(device)


def capture(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that replays `step` on the device, on the same tensors.

    A step that waits for the device is detected before the capture and raises an ordinary error. A failed capture leaves the stream
    and the allocator as they were.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    current = torch.cuda.current_stream()
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(current)
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_STEPS):
            rewind()
            step()
        rewind()
        with _raise_on_sync():
            step()
        rewind()
    current.wait_stream(side_stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # threads that meter energy or watch the device may run meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except BaseException:
        # If ending the capture fails, torch leaves its own stream current and the allocator in the graph's pool.
        torch.cuda.set_stream(current)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
        raise
    return graph.replay  # type: ignore[no-any-return]


@contextlib.contextmanager
def _raise_on_sync() -> Iterator[None]:
    """Makes torch raise an error where it would wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def failure(error: Exception) -> str:
    """Returns a failed capture as a clause about the model."""
    return f"capturing its decode step failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def free(device: torch.device) -> None:
    """Returns the memory of unreferenced decoders to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with contextlib.suppress(RuntimeError):  # may fail after a failed capture
            torch.cuda.empty_cache()
