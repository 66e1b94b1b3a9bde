"""Defines runtimes, the programs that serve an artifact; an artifact is scored and measured through its runtime.

Each runtime is a module of this package with a class `Runtime`, an open artifact (`Served`), and a function `version(device)`.
transformers is the reference and the default. Only llama.cpp serves GGUF files. vLLM needs a CUDA device.

    python evaluate.py model=local model.path=FOLDER hardware.runtime=llama_cpp
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from winnow.core.errors import UserError, as_unservable
from winnow.hardware.device import Hardware
from winnow.model import adapter
from winnow.model.folder_checks import gguf_file
from winnow.model.lm import LM

if TYPE_CHECKING:
    import numpy as np

    from winnow.hardware.footprint import PeakMemory
    from winnow.runtime.latency import Timing

logger = logging.getLogger(__name__)


class Served(Protocol):
    """A model opened by a runtime: one copy of its weights, for scoring and for measuring.

    Attributes:
        name: name of the runtime, a value of `hardware.runtime`.
        vocab_size: upper bound of token ids (exclusive).
        context: maximum number of tokens in a sequence; None where the model does not say.
        runtime_mode: how it decodes: `graph` replays CUDA graphs, `eager` launches every kernel from Python; None where the
            runtime's own program decides it.
    """

    name: str
    vocab_size: int
    context: int | None
    runtime_mode: str | None

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """Returns the log-likelihood in nats of each token but the first; non-finite logits give non-finite values."""

    def next_tokens(self, ids: Sequence[int], targets: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Returns predictions after each token but the last: token ids [T-1, K] and their log-probabilities in nats.

        Args:
            targets: token ids [T-1, K] to score, or the number K of most likely tokens to return.

        Raises:
            NotImplementedError: the runtime cannot return them.
        """

    def next_tokens_batch(
        self, rows: Sequence[Sequence[int]], targets: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns `next_tokens` of many rows, each with its own targets, batched as it suits the device."""

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        """Answers prompts of equal length as one batch, greedily, each with exactly `output_tokens`, and times it."""

    def weights_memory_bytes(self) -> int:
        """Returns the bytes of the weights in memory."""

    def peak_memory(self) -> PeakMemory:
        """Returns a context manager that measures the peak memory of requests."""

    def close(self) -> None:
        """Releases what opening the model allocated."""


def choose_runtime(lm: LM, hardware: Hardware) -> str:
    """Returns the name of the runtime that serves `lm`: the configured one, or llama.cpp for a GGUF file.

    Raises:
        UserError: the configured runtime does not read the model's format.
    """
    runtime = hardware.runtime
    if lm.path is not None and gguf_file(Path(lm.path)) is not None:
        if runtime == "vllm":
            raise UserError(f"hardware.runtime=vllm does not serve GGUF files such as {lm.name}; use llama_cpp")
        return "llama_cpp"
    if runtime == "llama_cpp":
        raise UserError(
            f"hardware.runtime=llama_cpp serves GGUF files, and {lm.name} is none; make one of it with "
            f"compress.py method=[...,gguf], or use hardware.runtime=transformers"
        )
    if runtime == "vllm" and adapter.folder_of(lm.path) is not None:
        raise UserError(
            f"hardware.runtime=vllm does not load the adapter beside {lm.name}; use hardware.runtime=transformers"
        )
    return runtime


def installed_runtimes(lm: LM, device: str) -> dict[str, str]:
    """Returns the installed runtimes that read the format of `lm`: their versions by name."""
    assert lm.path is not None
    names = ("llama_cpp",) if gguf_file(Path(lm.path)) is not None else ("transformers", "vllm")
    has_adapter = adapter.folder_of(lm.path) is not None
    if has_adapter:
        names = ("transformers",)
    versions = {name: _module(name).version(device) for name in names}
    if has_adapter and versions["transformers"]:
        versions["transformers"] += f" with peft {metadata.version('peft')}"
    return {name: version for name, version in versions.items() if version is not None}


@contextlib.contextmanager
def serving(
    lm: LM,
    hardware: Hardware | None = None,
    served: Served | None = None,
) -> Iterator[Served]:
    """Yields `lm` opened in its runtime: `served` if it is already open, otherwise a new one that is closed after the block.

    Raises:
        UserError: the runtime does not read the model's format, or is not installed.
        Unservable: the runtime cannot load the model.
    """
    if served is not None:
        yield served
        return
    hardware = hardware or Hardware("cpu", device=lm.loading.device)
    name = choose_runtime(lm, hardware)
    if name != hardware.runtime:
        logger.info(f"runtime: {lm.name} is a GGUF file: it is served by {name}, not by {hardware.runtime}")
    with as_unservable(f"{lm.path or lm.name}: loading it in {name}"):
        opened: Served = _module(name).Runtime(lm, hardware)
    try:
        yield opened
    finally:
        opened.close()


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
