"""Serves GGUF files by llama.cpp in this process, through the C API that llama-cpp-python binds.

Token ids go in and logits come out: the tokenizer is that of the artifact's folder, as for transformers. A `Context` is a KV
cache of the size that the current work needs; a runtime has one at a time. The KV cache is in single precision for a model in
single precision and in half precision otherwise, and flash attention is off, so that scores of an F32 file equal those of
transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from winnow.core.errors import Unservable, UserError
from winnow.core.libraries import require
from winnow.hardware.device import Hardware
from winnow.hardware.footprint import PeakMemory
from winnow.model.folder_checks import gguf_file
from winnow.model.lm import LM
from winnow.runtime.latency import Timing

BATCH_TOKENS = 2048  # tokens a call; llama.cpp computes them in chunks of 512
MAX_LOGITS = 2**24  # logits that one call may return
_ALL_F32 = 0  # enum llama_ftype
_F32, _F16 = 0, 1  # enum ggml_type
_NO_FLASH_ATTENTION = 0  # enum llama_flash_attn_type


def version(device: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("llama-cpp-python")
    return None


class Token(NamedTuple):
    """A token to compute: its position, the sequences that contain it, and whether its logits are needed."""

    id: int
    position: int
    sequences: tuple[int, ...] = (0,)
    needs_logits: bool = False


class Runtime:
    """A runtime for the GGUF file of `lm.path`.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UserError: the device is CUDA, and llama-cpp-python is built without it.
        Unservable: llama.cpp cannot load the file.
    """

    name = "llama_cpp"
    runtime_mode: str | None = None

    def __init__(self, lm: LM, hardware: Hardware) -> None:
        require("llama_cpp")
        import llama_cpp
        import torch

        from winnow.model.gguf.native import silent

        assert lm.path is not None
        file = gguf_file(Path(lm.path))
        assert file is not None
        cuda = hardware.device == "cuda"
        if cuda and not llama_cpp.llama_supports_gpu_offload():
            raise UserError(
                f"hardware={hardware.name} wants CUDA, and llama-cpp-python is built without it; build it with "
                f"CMAKE_ARGS=-DGGML_CUDA=on, or use hardware=cpu"
            )
        self._lm, self._cuda = lm, cuda
        self._context: Context | None = None
        self.threads = hardware.threads or torch.get_num_threads()
        self._open = contextlib.ExitStack()
        self.errors: list[str] = self._open.enter_context(silent())  # error lines of llama.cpp
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = -1 if cuda else 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            self._open.close()
            reason = self.errors[0] if self.errors else "it does not say why"
            raise Unservable(f"model.path={lm.path}: llama.cpp cannot load {file.name}: {reason}")
        self._open.callback(llama_cpp.llama_model_free, self.model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self.context: int | None = int(llama_cpp.llama_model_n_ctx_train(self.model))
        self.cache_type = _F32 if llama_cpp.llama_model_ftype(self.model) == _ALL_F32 else _F16

    def cache(self, sequences: int, length: int, shared: bool = False) -> Context:
        """Returns an empty KV cache for `sequences` sequences of `length` tokens each, or of `length` tokens together if `shared`.

        The previous cache is freed, unless it has the same size.
        """
        size = (sequences, length, shared)
        if self._context is None or self._context.size != size:
            self.drop_cache()
            self._context = Context(self, *size)
        self._context.clear()
        return self._context

    def drop_cache(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def end_ids(self) -> set[int]:
        """Returns the tokens that end an answer, as the artifact's configuration names them."""
        from transformers import AutoConfig, GenerationConfig

        assert self._lm.path is not None
        has_settings = (Path(self._lm.path) / "generation_config.json").is_file()
        settings = (GenerationConfig if has_settings else AutoConfig).from_pretrained(self._lm.path)
        ids = settings.eos_token_id
        return set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        _, log_probs = self.next_tokens(ids, np.array(ids[1:])[:, None])
        return [float(value) for value in log_probs[:, 0]]

    def next_tokens(self, ids: Sequence[int], targets: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        cache = self.cache(1, len(ids))
        tokens = [Token(token, i, needs_logits=True) for i, token in enumerate(ids[:-1])]
        columns, values = [], []
        offset = 0
        for logits in cache.compute(tokens):
            log_probs = log_softmax(logits)
            if isinstance(targets, int):
                columns.append(np.argsort(-log_probs, axis=-1, kind="stable")[:, :targets])
            else:
                columns.append(targets[offset : offset + len(log_probs)])
            values.append(np.take_along_axis(log_probs, columns[-1], -1))
            offset += len(log_probs)
        return np.concatenate(columns), np.concatenate(values)

    def next_tokens_batch(
        self, rows: Sequence[Sequence[int]], targets: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        targets_by_row: Sequence[np.ndarray | int] = [targets] * len(rows) if isinstance(targets, int) else targets
        return [self.next_tokens(ids, row_targets) for ids, row_targets in zip(rows, targets_by_row, strict=True)]

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        sequences, length = len(prompts), len(prompts[0])
        cache = self.cache(sequences, length + output_tokens)
        started = time.perf_counter()
        tokens = [
            Token(token, i, (n,), needs_logits=i == length - 1)
            for n, ids in enumerate(prompts)
            for i, token in enumerate(ids)
        ]
        first = None
        for position in range(length, length + output_tokens):
            next_ids = np.concatenate([logits.argmax(-1) for logits in cache.compute(tokens)])
            first = first or time.perf_counter()
            tokens = [Token(int(token), position, (n,), needs_logits=True) for n, token in enumerate(next_ids)]
        assert first is not None
        return Timing(first_s=first - started, total_s=time.perf_counter() - started)

    def weights_memory_bytes(self) -> int:
        import llama_cpp

        return int(llama_cpp.llama_model_size(self.model))  # mapped from the file into main memory

    def peak_memory(self) -> PeakMemory:
        return PeakMemory("cuda" if self._cuda else "cpu", torch_allocator=False)

    def close(self) -> None:
        self.drop_cache()
        self._open.close()


class Context:
    """A KV cache and the computation that fills it."""

    def __init__(self, runtime: Runtime, sequences: int, length: int, shared: bool) -> None:
        import llama_cpp

        self.size = (sequences, length, shared)
        self._runtime = runtime
        settings = llama_cpp.llama_context_default_params()
        # without `shared`, every sequence has its own part, rounded up to 256 tokens
        settings.n_ctx = length if shared else sequences * (-(-length // 256) * 256)
        settings.n_batch = BATCH_TOKENS
        settings.n_seq_max = sequences
        settings.kv_unified = shared  # a token may then belong to several sequences
        settings.n_threads = settings.n_threads_batch = runtime.threads
        settings.type_k = settings.type_v = runtime.cache_type
        settings.flash_attn_type = _NO_FLASH_ATTENTION
        self._context = llama_cpp.llama_init_from_model(runtime.model, settings)
        if not self._context:
            errors = "; ".join(runtime.errors[-2:])
            raise MemoryError(f"llama.cpp cannot make a cache of {settings.n_ctx:,} tokens (out of memory?): {errors}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._max_logits_rows = max(1, min(BATCH_TOKENS, MAX_LOGITS // runtime.vocab_size))

    def clear(self) -> None:
        import llama_cpp

        llama_cpp.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def compute(self, tokens: Sequence[Token]) -> Iterator[np.ndarray]:
        """Yields logits [tokens of the chunk that need them, vocabulary]; each array is valid until the next one is requested."""
        start = logits_rows = 0
        for end, token in enumerate(tokens):
            if end - start == BATCH_TOKENS or (token.needs_logits and logits_rows == self._max_logits_rows):
                yield self._decode(tokens[start:end], logits_rows)
                start, logits_rows = end, 0
            logits_rows += token.needs_logits
        yield self._decode(tokens[start:], logits_rows)

    def _decode(self, tokens: Sequence[Token], logits_rows: int) -> np.ndarray:
        import llama_cpp

        columns: dict[str, np.ndarray] = {
            "token": np.array([t.id for t in tokens], np.int32),
            "pos": np.array([t.position for t in tokens], np.int32),
            "n_seq_id": np.array([len(t.sequences) for t in tokens], np.int32),
            "logits": np.array([t.needs_logits for t in tokens], np.int8),
        }
        sequences = np.array([n for t in tokens for n in t.sequences], np.int32)
        starts = np.cumsum(columns["n_seq_id"]) - columns["n_seq_id"]
        # pointers into `sequences`
        columns["seq_id"] = (sequences.ctypes.data + starts * sequences.itemsize).astype(np.uintp)
        batch = llama_cpp.llama_batch(n_tokens=len(tokens))
        kinds = dict(llama_cpp.llama_batch._fields_)
        for name, column in columns.items():
            setattr(batch, name, ctypes.cast(column.ctypes.data, kinds[name]))
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            errors = "; ".join(self._runtime.errors[-2:])
            raise RuntimeError(f"llama.cpp cannot compute {len(tokens)} tokens (code {code}): {errors}")
        shape = (logits_rows, self._runtime.vocab_size)
        if not logits_rows:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)

    def close(self) -> None:
        import llama_cpp

        llama_cpp.llama_free(self._context)


def log_softmax(logits_tv: np.ndarray) -> np.ndarray:
    """Returns log-probabilities [T, vocabulary] of logits."""
    shifted = logits_tv - logits_tv.max(-1, keepdims=True)
    probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return probabilities
