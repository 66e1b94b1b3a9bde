"""Whether the type that is computed in by default is the fastest that this machine has: in training and in a forward pass.

    python bench/precision.py
    ONEDNN_MAX_CPU_ISA=AVX2 python bench/precision.py     # as on a processor without AVX-512

`lora_auto_vs_best`: tokens/s of LoRA on the embedded model at `precision=auto`, to the faster of `32-true` and `bf16-mixed`.
`forward_auto_vs_best`: tokens/s of forward passes at `hardware.dtype=auto`, to the faster of float32 and bfloat16. Each time the
three are run in turn; medians of five.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from common import Result, report

TARGET = 0.9
REPEATS = 5


def lora_tokens_per_second(precision: str) -> float:
    from winnow.hardware.run import Run
    from winnow.method.lora import Lora
    from winnow.nano.embedded import trained

    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch))
        notes = Lora(steps=4, tokens_per_batch=512, precision=precision)(trained(), run).notes
    return float(notes["training"]["tokens_per_second"])


def forward_tokens_per_second(dtype: str) -> float:
    import torch

    from winnow.hardware.device import Hardware
    from winnow.nano.embedded import trained
    from winnow.runtime import serving

    ids = list(range(5, 261))
    with serving(trained(), Hardware("cpu", dtype=dtype)) as served, torch.inference_mode():
        served.log_likelihoods(ids)
        started = time.perf_counter()
        for _ in range(4):
            served.log_likelihoods(ids)
        return 4 * len(ids) / (time.perf_counter() - started)


def main() -> None:
    results = []
    for name, work, others in (
        ("lora", lora_tokens_per_second, ("32-true", "bf16-mixed")),
        ("forward", forward_tokens_per_second, ("float32", "bfloat16")),
    ):
        runs: dict[str, list[float]] = {setting: [] for setting in ("auto", *others)}
        for _ in range(REPEATS):
            for setting, found in runs.items():
                found.append(work(setting))
        middle = {setting: statistics.median(found) for setting, found in runs.items()}
        print(name, ", ".join(f"{setting} {value:,.0f} tokens/s" for setting, value in middle.items()), flush=True)
        best = max(middle[setting] for setting in others)
        results.append(Result(f"{name}_auto_vs_best", middle["auto"] / best, TARGET, "higher"))
    report("precision", results)


if __name__ == "__main__":
    main()
