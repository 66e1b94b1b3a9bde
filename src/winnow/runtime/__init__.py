"""Runtimes: the programs that serve an artifact. It is scored and measured through the one that would serve it.

Each is a module of this package with a class `Runtime` that has an artifact open (`Served`) and a function `version(device)`.
transformers is the reference and the default. GGUF files are served by llama.cpp alone. vLLM needs a CUDA device.

    python evaluate.py model=local model.path=FOLDER hardware.runtime=llama_cpp
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
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


class Served(Protocol):
    """A model that a runtime has open: one copy of its weights, for scoring and for measuring.

    Attributes:
        name: of the runtime, as `hardware.runtime` has it.
        vocab_size: token ids are below it.
        context: tokens that a sequence may have; None where the model does not say.
        runtime_mode: how it decodes: `graph`, from CUDA graphs, or `eager`, kernel by kernel from Python; None where the
            runtime's own program decides it.
    """

    name: str
    vocab_size: int
    context: int | None
    runtime_mode: str | None

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """In nats, of each token but the first; a logit that is not finite shows as one that is not."""

    def next_tokens(self, ids: Sequence[int], wanted: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """What is expected after each token but the last: token ids [T-1, K] and their log-probabilities, in nats.

        `wanted`: of which tokens, or how many of the likeliest. A runtime that cannot tell raises NotImplementedError.
        """

    def next_tokens_of(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`next_tokens` of many rows, each with its own wanted tokens, in the way that suits the device."""

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        """Answers prompts of one length at once, greedily, each with exactly `output_tokens`, and times it."""

    def weights_memory_bytes(self) -> int:
        """Of the weights as they are held."""

    def peak_memory(self) -> PeakMemory:
        """A context manager around requests whose peak memory is wanted."""

    def close(self) -> None:
        """Lets go of what opening took."""


def chosen(lm: LM, hardware: Hardware) -> str:
    """The runtime that serves `lm`: the one that is asked for, or llama.cpp for a GGUF file where none is.

    Raises:
        UserError: the one that is asked for does not read the model's format.
    """
    wanted = hardware.runtime
    if lm.path is not None and gguf_file(Path(lm.path)) is not None:
        if wanted == "vllm":
            raise UserError(f"hardware.runtime=vllm does not serve GGUF files such as {lm.name}; use llama_cpp")
        return "llama_cpp"
    if wanted == "llama_cpp":
        raise UserError(
            f"hardware.runtime=llama_cpp serves GGUF files, and {lm.name} is none; make one of it with "
            f"compress.py method=[...,gguf], or use hardware.runtime=transformers"
        )
    if wanted == "vllm" and adapter.folder_of(lm.path) is not None:
        raise UserError(
            f"hardware.runtime=vllm does not load the adapter beside {lm.name}; use hardware.runtime=transformers"
        )
    return wanted


def candidates(lm: LM, device: str) -> dict[str, str]:
    """The runtimes that read the format of `lm` and are installed here, by name, with their versions."""
    assert lm.path is not None
    names = ("llama_cpp",) if gguf_file(Path(lm.path)) is not None else ("transformers", "vllm")
    adapted = adapter.folder_of(lm.path) is not None
    if adapted:
        names = ("transformers",)
    found = {name: _module(name).version(device) for name in names}
    if adapted and found["transformers"]:
        found["transformers"] += f" with peft {metadata.version('peft')}"
    return {name: version for name, version in found.items() if version is not None}


@contextlib.contextmanager
def serving(
    lm: LM,
    hardware: Hardware | None = None,
    log: Callable[[str], None] = lambda line: None,
    served: Served | None = None,
) -> Iterator[Served]:
    """`lm` in its runtime: `served`, where it is open already, else one that is opened for this block.

    Raises:
        UserError: the runtime does not read the model's format, or is not there.
        Unservable: it cannot load the model.
    """
    if served is not None:
        yield served
        return
    hardware = hardware or Hardware("cpu", device=lm.loading.device)
    name = chosen(lm, hardware)
    if name != hardware.runtime:
        log(f"runtime: {lm.name} is a GGUF file: it is served by {name}, not by {hardware.runtime}")
    with as_unservable(f"{lm.path or lm.name}: loading it in {name}"):
        opened: Served = _module(name).Runtime(lm, hardware, log)
    try:
        yield opened
    finally:
        opened.close()


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
