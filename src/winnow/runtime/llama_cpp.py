"""llama.cpp, in this process, through the C API that llama-cpp-python binds: what serves GGUF files.

Token ids go in and logits come out: the tokenizer is that of the artifact's folder, as for transformers. A `Context` is a KV
cache of the size that the work at hand needs; one is held at a time. The cache is in single precision for a model in single
precision and in half precision otherwise, and flash attention is off: scores of an F32 file are then those of transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
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

BATCH = 2048  # tokens a call; llama.cpp computes them in parts of 512
MOST_LOGITS = 2**24  # numbers that a call gives back
_ALL_F32 = 0  # enum llama_ftype
_F32, _F16 = 0, 1  # enum ggml_type
_NO_FLASH_ATTENTION = 0  # enum llama_flash_attn_type


def version(device: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("llama-cpp-python")
    return None


class Token(NamedTuple):
    """A token to compute: where it stands, in which sequences (several share it), and whether its logits are wanted."""

    id: int
    position: int
    sequences: tuple[int, ...] = (0,)
    wanted: bool = False


class Runtime:
    """The GGUF file of `lm.path`.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UserError: the device is CUDA, and it is built without.
        Unservable: llama.cpp cannot load the file.
    """

    name = "llama_cpp"
    runtime_mode: str | None = None

    def __init__(self, lm: LM, hardware: Hardware, log: Callable[[str], None] = lambda line: None) -> None:
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
        self.errors: list[str] = self._open.enter_context(silent())  # what llama.cpp complained about
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
        """An empty KV cache for so many sequences of `length` tokens each; `shared`: of `length` tokens altogether.

        The one that there was is given up, unless it is the same.
        """
        wanted = (sequences, length, shared)
        if self._context is None or self._context.size != wanted:
            self.drop_cache()
            self._context = Context(self, *wanted)
        self._context.clear()
        return self._context

    def drop_cache(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def end_ids(self) -> set[int]:
        """The tokens that end an answer, as the artifact's configuration names them."""
        from transformers import AutoConfig, GenerationConfig

        assert self._lm.path is not None
        has_settings = (Path(self._lm.path) / "generation_config.json").is_file()
        settings = (GenerationConfig if has_settings else AutoConfig).from_pretrained(self._lm.path)
        ids = settings.eos_token_id
        return set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        _, found = self.next_tokens(ids, np.array(ids[1:])[:, None])
        return [float(value) for value in found[:, 0]]

    def next_tokens(self, ids: Sequence[int], wanted: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        cache = self.cache(1, len(ids))
        tokens = [Token(token, i, wanted=True) for i, token in enumerate(ids[:-1])]
        columns, values = [], []
        done = 0
        for logits in cache.compute(tokens):
            found = log_softmax(logits)
            if isinstance(wanted, int):
                columns.append(np.argsort(-found, axis=-1, kind="stable")[:, :wanted])
            else:
                columns.append(wanted[done : done + len(found)])
            values.append(np.take_along_axis(found, columns[-1], -1))
            done += len(found)
        return np.concatenate(columns), np.concatenate(values)

    def next_tokens_of(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        each: Sequence[np.ndarray | int] = [wanted] * len(rows) if isinstance(wanted, int) else wanted
        return [self.next_tokens(ids, of_row) for ids, of_row in zip(rows, each, strict=True)]

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        sequences, length = len(prompts), len(prompts[0])
        cache = self.cache(sequences, length + output_tokens)
        started = time.perf_counter()
        tokens = [
            Token(token, i, (n,), wanted=i == length - 1)
            for n, ids in enumerate(prompts)
            for i, token in enumerate(ids)
        ]
        first = None
        for position in range(length, length + output_tokens):
            best = np.concatenate([logits.argmax(-1) for logits in cache.compute(tokens)])
            first = first or time.perf_counter()
            tokens = [Token(int(token), position, (n,), wanted=True) for n, token in enumerate(best)]
        assert first is not None
        return Timing(first_s=first - started, total_s=time.perf_counter() - started)

    def weights_memory_bytes(self) -> int:
        import llama_cpp

        return int(llama_cpp.llama_model_size(self.model))  # mapped from the file, in main memory

    def peak_memory(self) -> PeakMemory:
        return PeakMemory("cuda" if self._cuda else "cpu", torch_allocator=False)

    def close(self) -> None:
        self.drop_cache()
        self._open.close()


class Context:
    """A KV cache, and the computation that fills it."""

    def __init__(self, runtime: Runtime, sequences: int, length: int, shared: bool) -> None:
        import llama_cpp

        self.size = (sequences, length, shared)
        self._runtime = runtime
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = length if shared else sequences * (-(-length // 256) * 256)  # each its part, of whole 256s
        settings.n_batch = BATCH
        settings.n_seq_max = sequences
        settings.kv_unified = shared  # a token may then be in several sequences
        settings.n_threads = settings.n_threads_batch = runtime.threads
        settings.type_k = settings.type_v = runtime.cache_type
        settings.flash_attn_type = _NO_FLASH_ATTENTION
        self._context = llama_cpp.llama_init_from_model(runtime.model, settings)
        if not self._context:
            errors = "; ".join(runtime.errors[-2:])
            raise MemoryError(f"llama.cpp cannot make a cache of {settings.n_ctx:,} tokens (out of memory?): {errors}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._most_wanted = max(1, min(BATCH, MOST_LOGITS // runtime.vocab_size))

    def clear(self) -> None:
        import llama_cpp

        llama_cpp.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def compute(self, tokens: Sequence[Token]) -> Iterator[np.ndarray]:
        """Logits [wanted tokens of a part, vocabulary], part by part; each is valid until the next is asked for."""
        start = wanted = 0
        for end, token in enumerate(tokens):
            if end - start == BATCH or (token.wanted and wanted == self._most_wanted):
                yield self._decode(tokens[start:end], wanted)
                start, wanted = end, 0
            wanted += token.wanted
        yield self._decode(tokens[start:], wanted)

    def _decode(self, tokens: Sequence[Token], wanted: int) -> np.ndarray:
        import llama_cpp

        columns: dict[str, np.ndarray] = {
            "token": np.array([t.id for t in tokens], np.int32),
            "pos": np.array([t.position for t in tokens], np.int32),
            "n_seq_id": np.array([len(t.sequences) for t in tokens], np.int32),
            "logits": np.array([t.wanted for t in tokens], np.int8),
        }
        sequences = np.array([n for t in tokens for n in t.sequences], np.int32)
        starts = np.cumsum(columns["n_seq_id"]) - columns["n_seq_id"]
        columns["seq_id"] = (sequences.ctypes.data + starts * sequences.itemsize).astype(np.uintp)  # pointers into it
        batch = llama_cpp.llama_batch(n_tokens=len(tokens))
        kinds = dict(llama_cpp.llama_batch._fields_)
        for name, column in columns.items():
            setattr(batch, name, ctypes.cast(column.ctypes.data, kinds[name]))
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            errors = "; ".join(self._runtime.errors[-2:])
            raise RuntimeError(f"llama.cpp cannot compute {len(tokens)} tokens (code {code}): {errors}")
        shape = (wanted, self._runtime.vocab_size)
        if not wanted:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)

    def close(self) -> None:
        import llama_cpp

        llama_cpp.llama_free(self._context)


def log_softmax(logits_tv: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, vocabulary] of logits."""
    shifted = logits_tv - logits_tv.max(-1, keepdims=True)
    probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return probabilities
