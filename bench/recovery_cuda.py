"""The CUDA half of `bench/recovery.py`: LoRA and QLoRA on a random model in the shape of Llama-3.1-8B, rows of 2048 tokens.

Each in a process of its own, through the stage that `train.py` runs. MFU counts 4 N operations a token (forward, and the
inputs' gradient; adapters are below 1 %), N the weights of the blocks and the head, against the dense bfloat16 figure of the
device's configuration (`conf/hardware`), or `tflops=`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY
from methods import random_model

PUBLIC = (
    "public figures (torchtune): Llama-3.1-8B, one A6000 of 48 GB: LoRA 4,699 tokens/s at 30.3 GiB; "
    "3B on an A100: LoRA 8,210 tokens/s at 8.5 GiB, QLoRA 8,035 at 4.6 GiB"
)
ROW, ROWS, STEPS = 2048, 8, 20


def one(method: str, model: str) -> dict[str, float]:
    """Tokens/s, peak GiB and parameters of one training."""
    import torch

    from winnow.method.lora import Lora
    from winnow.method.qlora import QLoRA
    from winnow.model.load import pretrained
    from winnow.types import Run

    stage = {"lora": Lora, "qlora": QLoRA}[method](
        steps=STEPS, max_length=ROW, tokens_per_batch=ROW * ROWS, tokens_per_device=ROW, checkpoint_minutes=1e6
    )
    with tempfile.TemporaryDirectory() as scratch:
        lm = pretrained(model)
        parameters = sum(p.numel() for p in lm.model.parameters()) - lm.model.get_input_embeddings().weight.numel()
        torch.cuda.reset_peak_memory_stats()
        trained = stage(lm, Run(Path(scratch), device="cuda", log=lambda line: print(line, file=sys.stderr)))
        speed = trained.manifest["_notes"]["training"]["tokens_per_second"]
    peak = torch.cuda.max_memory_allocated() / 2**30
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
