"""Two gloo processes with accumulation against one process: the loss and the gradients of a step on ragged documents, fp32.

`measure()` is called by bench/recovery.py; run as a script this is one of the processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROCESSES = 2
TOKENS, TOKENS_PER_DEVICE = 2048, 256  # of a step, and at a time: four batches a device with two, eight with one


def measure(parallel: str = "ddp", lora: bool = False) -> float:
    """The largest relative difference: of the loss, and of the vector of all gradients."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        found = []
        for processes in (1, PROCESSES):
            path = Path(folder) / f"{processes}.pt"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            line = [sys.executable, *(launcher if processes > 1 else []), __file__, str(path), parallel, str(int(lora))]
            done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(line)} failed:\n{done.stdout}\n{done.stderr}")
            found.append(torch.load(path, weights_only=True))
    one, two = found
    assert one["gradients"].keys() == two["gradients"].keys() and one["gradients"]
    ours, reference = (torch.cat([g.flatten().double() for _, g in sorted(x["gradients"].items())]) for x in (two, one))
    gradient = float((ours - reference).norm() / reference.norm())
    return max(gradient, abs(two["loss"] - one["loss"]) / abs(one["loss"]))


def environment() -> dict[str, str]:
    """One thread each, and the tree that this file lies in."""
    source = str(Path(__file__).resolve().parents[1] / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def process(path: Path, parallel: str, lora: bool) -> None:
    """Trains a small random model for one step, and writes the first process's loss and the step's gradients."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.core.types import Calibration
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode
    from winnow.hardware.run import Run
    from winnow.method.lora import Lora, add_adapters
    from winnow.nano.embedded import trained
    from winnow.training import dist_env
    from winnow.training.fit import Batching, fit
    from winnow.training.module import Recovery, Schedule

    tokenizer = trained().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = add_adapters(model, Lora(rank=4), seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # it starts at zero, where A has no gradient
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    gradients: dict[str, torch.Tensor] = {}

    def keep(module: Recovery, optimizer: Any) -> None:
        for name, parameter in module.student.model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                gradients[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()

    Recovery.on_before_optimizer_step = keep  # type: ignore[method-assign]
    rows = encode(documents(Calibration(), 400, seed=0), tokenizer, 200)
    run = Run(path.parent, devices=dist_env.world().size, parallel=parallel)
    fitted = fit(model, rows, Schedule(1e-3, 1), Batching(TOKENS, TOKENS_PER_DEVICE), run)
    if dist_env.world().is_rank_zero:
        torch.save({"loss": fitted.loss, "gradients": gradients}, path)


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
