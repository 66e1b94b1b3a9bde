"""The CUDA half of `bench/recovery.py`: LoRA and QLoRA on a random model in the shape of Llama-3.1-8B, rows of 2048 tokens.

    python bench/recovery_cuda.py lora FOLDER            # one method on a model at hand
    python bench/recovery_cuda.py lora FOLDER profile    # and where the time of two more steps goes

Each in a process of its own, through the stage that `train.py` runs, which chooses how many tokens lie on the device at a time.
MFU counts 4 N operations a token (forward, and the inputs' gradient; adapters are below 1 %), N the weights of the blocks and the
head, against the dense bfloat16 figure of the device's configuration (`conf/hardware`), or `tflops=`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, show_progress
from methods import random_model

PUBLIC = (
    "public figures (torchtune): Llama-3.1-8B, one A6000 of 48 GB: LoRA 4,699 tokens/s at 30.3 GiB; "
    "3B on an A100: LoRA 8,210 tokens/s at 8.5 GiB, QLoRA 8,035 at 4.6 GiB"
)
ROW, ROWS, STEPS = 2048, 8, 12
TOP = 15  # kernels of a profile


def one(method: str, model: str, profiled: str = "") -> dict[str, float]:
    """Tokens/s, peak GiB and parameters of one training; with `profiled`, two more steps' largest parts go to stderr."""
    import torch

    from winnow.hardware.run import Run
    from winnow.method.lora import Lora
    from winnow.method.qlora import QLoRA
    from winnow.model.pretrained import pretrained

    show_progress()
    kept = tempfile.TemporaryDirectory()  # what is found of the batch size, for the second training, too

    def trained(lm: Any, steps: int) -> Any:
        stage = {"lora": Lora, "qlora": QLoRA}[method](
            steps=steps, max_length=ROW, tokens_per_batch=ROW * ROWS, checkpoint_minutes=1e6
        )
        with tempfile.TemporaryDirectory() as scratch:
            return stage(lm, Run(Path(scratch), device="cuda", cache=Path(kept.name)))

    lm = pretrained(model)
    parameters = sum(p.numel() for p in lm.model.parameters()) - lm.model.get_input_embeddings().weight.numel()
    torch.cuda.reset_peak_memory_stats()
    lm, notes = trained(lm, STEPS)
    speed = notes["training"]["tokens_per_second"]
    peak = torch.cuda.max_memory_allocated() / 2**30
    if profiled:
        from torch.profiler import ProfilerActivity, profile

        fresh = lm if method == "lora" else pretrained(model)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
            trained(fresh, 2)
        table = watched.key_averages().table(sort_by="self_cuda_time_total", row_limit=TOP, max_name_column_width=70)
        print(table, file=sys.stderr)
    return {"tokens_per_s": speed, "peak_gib": peak, "parameters": parameters}


def measure(tflops: float | None) -> None:
    """Prints the table and the JSON line; there is no target, only figures to stand beside."""
    import torch

    print(f"{torch.cuda.get_device_name()}; {PUBLIC}", flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        model = random_model("8B", Path(name) / "model")
        for method in ("lora", "qlora"):
            line = [sys.executable, str(Path(__file__)), method, str(model)]
            done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, check=False)
            if done.returncode:
                raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if tflops:
                found["mfu"] = 4 * found.pop("parameters") * found["tokens_per_s"] / (tflops * 1e12)
            print(f"{method:<6} " + "  ".join(f"{k} {v:,.3g}" for k, v in found.items()), flush=True)
            results += [{"name": f"{method}_{k}", "value": v} for k, v in found.items()]
    print(json.dumps({"bench": "recovery_cuda", "results": results}))


if __name__ == "__main__":
    print(json.dumps(one(*sys.argv[1:])))
