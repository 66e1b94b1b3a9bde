"""Defines `Hardware`: the devices that figures are for, their limits, and the workload that they are measured with.

Each `conf/hardware/<name>.yaml` defines one `Hardware`. Nothing here starts CUDA, because a process that has used CUDA cannot be
forked, and trials are forks. GPUs are queried through NVML instead, which every driver includes.

    python evaluate.py hardware=cpu hardware.threads=1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from winnow.core.errors import UserError
from winnow.hardware.compute import fastest_dtype
from winnow.hardware.inventory import available_cores, cpu_model, physical_memory_bytes, used_gpus, visible_gpus

DTYPES = ("auto", "float32", "bfloat16", "float16")
PARALLEL = ("auto", "ddp", "fsdp")
DECODE = ("auto", "graph", "eager")
RUNTIMES = ("transformers", "vllm", "llama_cpp")  # modules of winnow.runtime
WORLD_AVERAGE_G_PER_KWH = 475.0  # IEA 2019; codecarbon uses it for unknown countries, too


@dataclass(frozen=True)
class Hardware:
    """A device, its limits, and how it is measured.

    Attributes:
        name: name of the config option, `hardware=<name>`.
        device: `cpu` or `cuda`.
        devices: number of devices that a command may use. One measured process uses them all; training has one process a device.
        parallel: how training uses several devices: `ddp` copies the model to each; `fsdp` shards it; `auto` uses fsdp where the
            forecast says that one device cannot hold the model.
        runtime: the runtime that serves the model, which is scored and measured through it: one of `RUNTIMES`. llama.cpp serves
            GGUF files instead of transformers, and the metrics say so.
        decode: how transformers answers timed requests: `graph` replays a CUDA graph of the decode step; `eager` launches every
            kernel from Python; `auto` uses a graph where the device and the model support it.
        dtype: compute dtype; `auto` is the one that the device computes fastest (`winnow.hardware.compute`). Saved weights keep
            the dtype of the base model.
        threads: processor threads for measuring; None keeps torch's choice. llama.cpp also scores with them.
        memory_limit_bytes: limit per device; None is all memory of the device.
        carbon_g_per_kwh: grams of CO2 equivalent per kWh at the location of the hardware.
        batch_size: batch size of benchmarks.
        latency_batch_size: requests served at once while latency, energy and peak memory are measured.
        prompt_tokens, output_tokens: length of each such request.
        warmup: requests before the first one that counts.
        repeats, seconds: latency is measured over at least this many requests, and over more until the time is spent.
        most_seconds: maximum time of warm-up and latency, whatever `warmup` and `repeats` say; each makes at least one request.
        energy_tokens, energy_seconds: energy is metered over this many output tokens, rounded up to whole requests, or until the
            time is spent, whichever comes first; over at least one request and one update of the counter.
        watch: whether measurements are watched for disturbances (`winnow.hardware.disturbance`).
        retry_seconds: maximum time of all repetitions of disturbed measurements together.
        tflops: the vendor's figure for dense bfloat16 products on one device; used only for time forecasts; a processor is
            measured instead.
    """

    name: str
    device: str = "cpu"
    devices: int = 1
    parallel: str = "auto"
    runtime: str = "transformers"
    decode: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    memory_limit_bytes: int | None = None
    carbon_g_per_kwh: float = WORLD_AVERAGE_G_PER_KWH
    batch_size: int = 16
    latency_batch_size: int = 1
    prompt_tokens: int = 32
    output_tokens: int = 32
    warmup: int = 2
    repeats: int = 5
    seconds: float = 3.0
    most_seconds: float = 30.0
    energy_tokens: int = 256
    energy_seconds: float = 3.0
    watch: bool = True
    retry_seconds: float = 8.0
    tflops: float | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"hardware.device={self.device} is not known; it is cpu or cuda")
        if self.runtime not in RUNTIMES:
            raise UserError(f"hardware.runtime={self.runtime} is not known; it is one of {', '.join(RUNTIMES)}")
        if self.parallel not in PARALLEL:
            raise UserError(f"hardware.parallel={self.parallel} is not known; it is one of {', '.join(PARALLEL)}")
        if self.dtype not in DTYPES:
            raise UserError(f"hardware.dtype={self.dtype} is not known; it is one of {', '.join(DTYPES)}")
        if self.decode not in DECODE:
            raise UserError(f"hardware.decode={self.decode} is not known; it is one of {', '.join(DECODE)}")
        if self.decode == "graph" and (self.device, self.runtime) != ("cuda", "transformers"):
            raise UserError(
                f"hardware.decode=graph is for hardware.device=cuda and hardware.runtime=transformers, not for "
                f"{self.device} and {self.runtime}; use hardware.decode=eager, or leave it at auto"
            )
        minimums = {"devices": 1, "batch_size": 1, "latency_batch_size": 1, "prompt_tokens": 1, "repeats": 1}
        minimums |= {"output_tokens": 2, "energy_tokens": 1, "warmup": 0, "seconds": 0, "carbon_g_per_kwh": 0}
        minimums |= {"most_seconds": 0, "energy_seconds": 0, "retry_seconds": 0}
        minimums |= {"tflops": 0} if self.tflops is not None else {}
        minimums |= {key: 1 for key in ("threads", "memory_limit_bytes") if getattr(self, key) is not None}
        for key, minimum in minimums.items():
            if getattr(self, key) < minimum:
                raise UserError(f"hardware.{key}={getattr(self, key)} is too small; it is at least {minimum}")

    def check(self) -> None:
        """Checks that the device is available.

        Raises:
            UserError: it is not; the message names an option that would work.
        """
        if self.device != "cuda":
            return
        gpu_count = len(visible_gpus())
        if gpu_count < self.devices:
            raise UserError(
                f"hardware={self.name} wants {self.devices} CUDA device{'s' if self.devices > 1 else ''}, "
                f"this machine has {gpu_count}; "
                + (f"use hardware={self.name} hardware.devices={gpu_count}" if gpu_count else "use hardware=cpu")
            )
        import torch

        if torch.version.cuda is None:
            raise UserError(
                f"hardware={self.name} wants CUDA, and the installed torch {torch.__version__} is built without it; "
                f"install a CUDA build of torch, or use hardware=cpu"
            )

    @property
    def compute_dtype(self) -> str:
        """The compute dtype, by torch's name."""
        return fastest_dtype(self.device) if self.dtype == "auto" else self.dtype

    def memory_bytes(self) -> int:
        """Returns the memory of one device in bytes: the configured limit, or what the machine has."""
        if self.memory_limit_bytes is not None:
            return self.memory_limit_bytes
        if self.device == "cpu":
            return physical_memory_bytes()
        return min((gpu.memory_bytes for gpu in used_gpus("cuda", self.devices)), default=0)

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that figures depend on; figures with different fingerprints are not comparable."""
        workload = ("batch_size", "latency_batch_size", "prompt_tokens", "output_tokens", "carbon_g_per_kwh")
        return {
            "name": self.name,
            "device": self.device,
            "devices": self.devices,
            "runtime": self.runtime,
            "decode": self.decode if self.device == "cuda" else "eager",
            "dtype": self.compute_dtype,
            "cpu": cpu_model(),
            "cores": available_cores(),
            "threads": self.threads or available_cores(),
            "gpus": [gpu.name for gpu in used_gpus(self.device, self.devices)],
            **{key: getattr(self, key) for key in workload},
        }
