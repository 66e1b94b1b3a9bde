"""Time and peak memory of `gptq`, `awq`, `autoround` and `wanda` here, and of the library called directly.

    python bench/methods.py                 # the embedded model, and a random one of 120 M parameters
    python bench/methods.py device=cuda     # a random model in the shape of an 8B one; public figures beside it
    python bench/methods.py methods=gptq,awq repeats=1

Each run is a process of its own, ours and the library's in turn: from a model in memory and the same calibration tokens to the
saved folder, imports not counted. `time_<method>` and `memory_<method>` are ratios, ours to the library's: the larger of the
models' medians. Memory is the peak resident set on the CPU, the allocator's peak on CUDA.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, report

TARGET = 1.05
SIZES: dict[str, dict[str, int]] = {
    "120M": {
        "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 24_000,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
PUBLIC = "public figures, A100-80G, 8B: AutoRound W4G128 12 min and 18 GB; GPTQ and AWQ about 30 min (older releases)"
SAMPLES = {"nano": (128, 64), "120M": (16, 128), "8B": (128, 2048)}  # rows, tokens each


def random_model(size: str, folder: Path) -> Path:
    """A saved Llama with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from winnow.model.load import load_tokenizer
    from winnow.model.loading import Loading
    from winnow.nano.embedded import WEIGHTS

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=4096, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(WEIGHTS), Loading()).save_pretrained(folder)
    return folder


def one(method: str, side: str, model: str, size: str, device: str, output: str) -> dict[str, float]:
    """In a process of its own: one run, its seconds and its peak bytes."""
    import torch
    from direct import BITS, GROUP_SIZE, ITERATIONS, PEERS, SPARSITY

    import winnow.data.calibration as calibration
    from winnow.core.targets import target_of
    from winnow.hardware.footprint import PeakMemory
    from winnow.hardware.run import Run
    from winnow.model.pretrained import pretrained
    from winnow.model.save import save

    if method == "autoround":
        import auto_round  # noqa: F401
    if side == "library" or method in ("gptq", "awq"):
        import llmcompressor  # noqa: F401
    rows, tokens = SAMPLES[size]
    lm = pretrained(model, device="cpu" if side == "ours" else device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.model.config.vocab_size
    batches = list(torch.randint(vocabulary, (rows, tokens), generator=generator).split(max(1, 4096 // tokens)))
    calibration.calibration_batches = lambda lm, run: (list(batches), "random")
    targets = {"gptq": "oneshot.GPTQ", "awq": "oneshot.AWQ", "autoround": "autoround.AutoRound", "wanda": "prune.Wanda"}
    knobs: dict[str, Any] = {"bits": BITS, "group_size": GROUP_SIZE} if method != "wanda" else {"sparsity": SPARSITY}
    knobs |= {"iters": ITERATIONS} if method == "autoround" else {}
    lm.tokenizer  # noqa: B018 (loaded before the clock starts)
    with tempfile.TemporaryDirectory() as scratch, PeakMemory(device) as peak:
        started = time.perf_counter()
        if side == "ours":
            stage = target_of(f"winnow.method.{targets[method]}")(**knobs)
            made = stage(lm, Run(Path(scratch), device=device))
            save(made.lm, Path(output))
        else:
            PEERS[method](lm.model, lm.tokenizer, batches, Path(output))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak.peak_bytes}


def child(*arguments: str) -> dict[str, float]:
    line = [sys.executable, str(REPOSITORY / "bench" / "methods.py"), "--one", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compared(method: str, model: str, size: str, device: str, repeats: int, folder: Path) -> tuple[float, float]:
    """Ratios of the median seconds and bytes, ours to the library's, from runs in turn."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "library": []}
    for repeat in range(repeats):
        for side in ("ours", "library") if repeat % 2 == 0 else ("library", "ours"):
            runs[side].append(child(method, side, model, size, device, str(folder / f"{method}-{side}-{repeat}")))
    middle = {s: {k: statistics.median(r[k] for r in found) for k in found[0]} for s, found in runs.items()}
    for side, found in middle.items():
        print(
            f"{method:<10} {size:<5} {side:<8} {found['seconds']:8.2f} s  {found['bytes'] / 2**20:8.0f} MiB", flush=True
        )
    ours, library = middle["ours"], middle["library"]
    return ours["seconds"] / library["seconds"], ours["bytes"] / library["bytes"]


def main(arguments: list[str]) -> None:
    settings = {"device": "cpu", "methods": "gptq,awq,autoround,wanda", "repeats": "5"}
    settings |= dict(argument.split("=", 1) for argument in arguments)
    device = settings["device"]
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if device == "cuda":
            print(PUBLIC)
            models = {"8B": random_model("8B", folder / "model")}
        else:
            from winnow.nano.embedded import WEIGHTS

            models = {"nano": WEIGHTS, "120M": random_model("120M", folder / "model")}
        for method in settings["methods"].split(","):
            ratios = [
                compared(method, str(path), size, device, int(settings["repeats"]), folder)
                for size, path in models.items()
            ]
            times, bytes_ = zip(*ratios, strict=True)
            results += [
                Result(f"time_{method}", max(times), TARGET, "lower"),
                Result(f"memory_{method}", max(bytes_), TARGET, "lower"),
            ]
    report("methods", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
