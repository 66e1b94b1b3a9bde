"""Greedy decoding from a CUDA graph: one decode step is captured once and replayed for every token.

A decode step of a small model is a few hundred kernels of microseconds each. Launched one by one from Python they take 24 ms on an
H200 for 30 layers, whatever the model; replayed as one graph they take what the GPU needs. There is no compilation: capturing
costs a few decode steps, `torch.compile` half a minute.

What a graph repeats is fixed: addresses, shapes, and every Python value. So the position is a tensor on the device, the cache has
its full size from the beginning, and nothing in a step may wait for the device. transformers' own static cache counts in Python
where a layer has a sliding window, and a replay would not count on; the layers here keep the keys and values of position p in slot
p modulo their size instead, which needs no branch. The prompt is read by one ordinary forward pass.

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
WARM_UPS = 2  # steps before the capture: libraries make their handles, Triton chooses its kernels
ALIGNED = 8  # scaled_dot_product_attention copies masks whose rows are no multiple of this


def has_graphs(model: Any) -> bool:
    """Whether the model is on a device that has graphs."""
    return bool(model.device.type == "cuda")


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer [batch, heads, size, width]: those of position p lie in slot p modulo `size`.

    Args:
        size: slots: the whole text, or the layer's window where that is shorter.
        slot: the one that the next token is written to, an integer tensor [1] on the device, which layers of one size share.
    """

    is_compileable = True

    def __init__(self, size: int, slot: Tensor, sliding: bool) -> None:
        super().__init__()
        self.size, self.slot = size, slot
        self.is_sliding = sliding
        self.decoding = False  # False: what comes next is a prompt

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
        kept = min(length, self.size)
        slots = torch.arange(length - kept, length, device=key_states.device) % self.size
        self.keys.index_copy_(2, slots, key_states[:, :, -kept:])
        self.values.index_copy_(2, slots, value_states[:, :, -kept:])
        return key_states, value_states  # a prompt sees itself alone, and needs no mask that hides empty slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # of a prompt: while decoding, masks are given

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.size


class Decoder:
    """Answers prompts of one shape greedily, each with exactly `output_tokens`; end-of-text tokens are never chosen.

    Making one reads the prompts once and captures the decode step. To answer: `first`, then `rest`. It belongs into
    `torch.inference_mode`, as its capture does.

    Attributes:
        tokens_bn: the answers [batch, output_tokens], once they are there.
    """

    def __init__(self, model: Any, prompt_bt: Tensor, output_tokens: int) -> None:
        from winnow.model import adapter

        self._model = adapter.base_model(model)
        self.shape = (*prompt_bt.shape, output_tokens)
        batch, prompt_tokens, _ = self.shape
        text, device = self._model.config.get_text_config(decoder=True), prompt_bt.device
        kinds, settings = get_layer_types_and_kwargs(text)
        length = -(-(prompt_tokens + output_tokens) // ALIGNED) * ALIGNED
        window = min(length, int(settings.get("sliding_window") or length))
        self._sizes = {FULL: length, SLIDING: window}
        forward = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        self._by_kind = hasattr(text, "layer_types")  # then a forward takes its masks by kind of layer
        self._kinds = sorted(set(kinds))
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the token that is read next
        self._made = torch.zeros(1, dtype=torch.int64, device=device)  # tokens of the answer so far
        self._slot = {kind: torch.zeros(1, dtype=torch.int64, device=device) for kind in self._kinds}
        self._token_b1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.tokens_bn = torch.zeros(batch, output_tokens, dtype=torch.int64, device=device)
        self._numbers = {kind: torch.arange(self._sizes[kind], device=device) for kind in self._kinds}
        self._penalty_v = end_of_text_penalty(self._model, device)
        self._layers = [SlotLayer(self._sizes[kind], self._slot[kind], kind == SLIDING) for kind in kinds]
        self._cache = Cache(layers=self._layers)
        self.first(prompt_bt)
        with self._model._optimize_model_for_decode():  # the experts of a mixture are computed as `generate` would
            self._replay = capture(self._step, self._rewind)

    def first(self, prompt_bt: Tensor) -> None:
        """Reads the prompts [batch, prompt_tokens] and chooses the first token; what was there before is forgotten."""
        for layer in self._layers:
            layer.decoding = False
        positions = torch.arange(prompt_bt.shape[1], device=prompt_bt.device)[None].expand_as(prompt_bt)
        logits_b1v = self._model(
            input_ids=prompt_bt,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        ).logits
        for layer in self._layers:
            layer.decoding = True
        self._rewind()
        self._token_b1.copy_(self._choose(logits_b1v))
        self.tokens_bn[:, :1].copy_(self._token_b1)

    def rest(self) -> None:
        """Chooses all further tokens; on a device that works on its own, they are there once it has done so."""
        for _ in range(self.shape[-1] - 1):
            self._replay()

    def _rewind(self) -> None:
        """Goes back to behind the prompt. Slots behind the position are masked, so what they hold does not matter."""
        self.position.fill_(self.shape[1])
        self._made.fill_(1)

    def _step(self) -> None:
        """Reads one token and chooses the next: the work that is captured. Nothing here may wait for the device."""
        for kind, slot in self._slot.items():
            slot.copy_(self.position % self._sizes[kind])
        masks = {kind: self._mask(kind) for kind in self._kinds}
        logits_b1v = self._model(
            input_ids=self._token_b1,
            attention_mask=masks if self._by_kind else next(iter(masks.values())),
            position_ids=self.position[None].expand_as(self._token_b1),
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        ).logits
        self._token_b1.copy_(self._choose(logits_b1v))
        self.tokens_bn.index_copy_(1, self._made, self._token_b1)
        self.position.add_(1)
        self._made.add_(1)

    def _mask(self, kind: str) -> Tensor:
        """What a token sees [batch, 1, 1, slots]: every slot up to its position, which are all once a window is full."""
        hidden = (self._numbers[kind] > self.position)[None, None, None].expand(self.shape[0], 1, 1, -1)
        if self._model.config._attn_implementation == "sdpa":
            return ~hidden
        dtype = self._model.dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)

    def _choose(self, logits_b1v: Tensor) -> Tensor:
        return (logits_b1v[:, -1].float() + self._penalty_v).argmax(-1, keepdim=True)


def end_of_text_penalty(model: Any, device: torch.device) -> Tensor:
    """What is added to logits [vocabulary]: minus infinity for end-of-text tokens, 0 for others."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    penalty = torch.zeros(int(model.config.get_text_config().vocab_size))
    penalty[[end for end in ends if 0 <= end < len(penalty)]] = -torch.inf
    return penalty.to(device)


def capture(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """A function that replays `step` on the device, on the tensors that it worked on.

    A step that waits for the device is found out before anything is captured: that is an ordinary error then. A capture that
    fails leaves the stream and the allocator as they were.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    before = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            rewind()
            step()
        rewind()
        with _waiting_is_an_error():
            step()
        rewind()
    before.wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # threads that meter energy or watch the device may go on meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except BaseException:
        # torch leaves its own stream current, and the allocator in the pool of the graph, where ending the capture fails
        torch.cuda.set_stream(before)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
        raise
    return graph.replay  # type: ignore[no-any-return]


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Has torch raise where it would wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once, that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def failure(error: Exception) -> str:
    """A capture that failed, as a clause about the model."""
    return f"capturing its decode step failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def free(device: torch.device) -> None:
    """Gives the memory of decoders that nobody holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with contextlib.suppress(RuntimeError):  # a capture that failed may not let it
            torch.cuda.empty_cache()
