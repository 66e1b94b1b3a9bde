"""The hardware that figures are for: what must be there, what fits in it, and the workload that it is measured with.

`conf/hardware/<name>.yaml` holds one `Hardware` each. Nothing here starts CUDA: a process that has touched CUDA cannot be
forked any more, and trials are forks. GPUs are asked about through NVML instead, which every driver brings along.

    python evaluate.py hardware=cpu hardware.threads=1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from winnow.core.errors import UserError
from winnow.hardware.compute import fastest
from winnow.hardware.inventory import available_cores, cpu_model, physical_memory_bytes, used_gpus, visible_gpus

DTYPES = ("auto", "float32", "bfloat16", "float16")
PARALLEL = ("auto", "ddp", "fsdp")
DECODE = ("auto", "graph", "eager")
RUNTIMES = ("transformers", "vllm", "llama_cpp")  # modules of winnow.runtime
WORLD_AVERAGE_G_PER_KWH = 475.0  # IEA 2019; what codecarbon, too, takes for an unknown country


@dataclass(frozen=True)
class Hardware:
    """A device, its limits, and how it is measured.

    Attributes:
        name: the option's own name, `hardware=<name>`.
        device: `cpu` or `cuda`.
        devices: how many of them a command may use; figures are for one process that uses them all, a training has a process
            on each.
        parallel: how they share a training: `ddp`, each with the whole model; `fsdp`, each with a part of it; `auto`: fsdp
            where the forecast says that one cannot hold the model.
        runtime: what serves the model, and so what it is scored and measured through: one of `RUNTIMES`. A GGUF file is served
            by llama.cpp instead of transformers, and the metrics say so.
        decode: how transformers answers timed requests: `graph`, from a CUDA graph of the decode step; `eager`, kernel by kernel
            from Python; `auto`: from a graph where the device and the model have one.
        dtype: that is computed in; `auto` is what the device computes fastest (`winnow.hardware.compute`). What is saved keeps
            the type of the base model.
        threads: of the processor, for measuring; None leaves torch's choice. llama.cpp scores with them, too.
        memory_limit_bytes: per device; None is all that there is.
        carbon_g_per_kwh: grams of CO2 equivalent per kWh where the hardware stands.
        batch_size: for benchmarks.
        latency_batch_size: requests served at once while latency, energy and peak memory are measured.
        prompt_tokens, output_tokens: of each such request.
        warmup: requests before the first that counts.
        repeats, seconds: latency is measured over at least so many requests, and over more until the time is spent.
        most_seconds: that warm-up and latency take at most, whatever `warmup` and `repeats` say; each is one request at least.
        energy_tokens, energy_seconds: energy is metered over so many output tokens, rounded up to whole requests, or until the
            time is spent, whichever comes first; over one request and one update of the counter at least.
        watch: whether measurements are watched for what disturbs them (`winnow.hardware.disturbance`).
        retry_seconds: that repetitions of disturbed measurements may take together.
        tflops: of dense products in bfloat16 on one device, by its vendor; for forecasts of time alone, where a processor
            is measured instead.
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
        least = {"devices": 1, "batch_size": 1, "latency_batch_size": 1, "prompt_tokens": 1, "repeats": 1}
        least |= {"output_tokens": 2, "energy_tokens": 1, "warmup": 0, "seconds": 0, "carbon_g_per_kwh": 0}
        least |= {"most_seconds": 0, "energy_seconds": 0, "retry_seconds": 0}
        least |= {"tflops": 0} if self.tflops is not None else {}
        least |= {key: 1 for key in ("threads", "memory_limit_bytes") if getattr(self, key) is not None}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise UserError(f"hardware.{key}={getattr(self, key)} is too small; it is at least {low}")

    def check(self) -> None:
        """That the device is there.

        Raises:
            UserError: it is not; the message names the option that would work.
        """
        if self.device != "cuda":
            return
        found = len(visible_gpus())
        if found < self.devices:
            raise UserError(
                f"hardware={self.name} wants {self.devices} CUDA device{'s' if self.devices > 1 else ''}, "
                f"this machine has {found}; "
                + (f"use hardware={self.name} hardware.devices={found}" if found else "use hardware=cpu")
            )
        import torch

        if torch.version.cuda is None:
            raise UserError(
                f"hardware={self.name} wants CUDA, and the installed torch {torch.__version__} is built without it; "
                f"install a CUDA build of torch, or use hardware=cpu"
            )

    @property
    def compute_dtype(self) -> str:
        """The type that is computed in, by torch's name."""
        return fastest(self.device) if self.dtype == "auto" else self.dtype

    def memory_bytes(self) -> int:
        """Bytes that one device may hold: the limit that is set, else what the machine has."""
        if self.memory_limit_bytes is not None:
            return self.memory_limit_bytes
        if self.device == "cpu":
            return physical_memory_bytes()
        return min((gpu.memory_bytes for gpu in used_gpus("cuda", self.devices)), default=0)

    def fingerprint(self) -> dict[str, Any]:
        """What figures depend on: those of hardware with another fingerprint are not comparable."""
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
