"""SIGKILL at random moments of a training run: it goes on each time, and ends with the very weights of an undisturbed run.

    python bench/kill_case.py 20

A run is `train.py`'s work, from reading the model to writing the artifact, in a child of a fork server; the model is tiny and in
single precision, and a checkpoint is written after almost every step, so that many kills hit one being written. A run that ends
before all kills are spent is compared, and another one is begun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 60
MODEL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PRELOAD = ["winnow.commands", "winnow.training.fit", "winnow.hardware.energy_preload", "winnow.search.preload"]


def measure(kills: int = 20, seed: int = 0) -> dict[str, Any]:
    """Kills runs `kills` times; `survived` counts the kills of runs that ended with the right weights all the same.

    `resumed` counts the runs whose last part began at a checkpoint: a kill may come before the first one, or after the training.
    """
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _finish(_start(context, "make_model", folder))
        started = time.monotonic()
        _finish(_start(context, "train", folder, "undisturbed"))
        seconds = time.monotonic() - started
        expected, _ = _result(folder / "undisturbed")
        spent = runs = resumed = survived = 0
        while spent < kills:
            run, before = f"run-{runs}", spent
            while True:
                process = _start(context, "train", folder, run)
                process.join(rng.uniform(0.0, 0.8 * seconds))
                if process.exitcode is not None or spent == kills:
                    _finish(process)
                    break
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                spent += 1
            found, went_on = _result(folder / run)
            runs, resumed = runs + 1, resumed + went_on
            survived += (spent - before) * (found == expected)
    return {"kills": spent, "survived": survived, "runs": runs, "resumed": resumed, "undisturbed_s": seconds}


def _start(context: Any, what: str, *arguments: Any) -> Any:
    process = context.Process(target=_child, args=(what, *arguments))
    process.start()
    return process


def _finish(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"a training ended with exit code {process.exitcode}")


def _result(folder: Path) -> tuple[bytes, bool]:
    """The weights that a run left, and whether it had gone on from a checkpoint."""
    manifest = json.loads((folder / "artifact" / "manifest.json").read_text())
    went_on = "resumed_at_step" in manifest["stages"][-1]["training"]
    if (folder / "outputs" / "scratch").exists():
        raise SystemExit("a finished training left its scratch folder")
    return (folder / "artifact" / "model.safetensors").read_bytes(), went_on


def _child(what: str, folder: Path, run: str = "") -> None:
    import torch

    torch.set_num_threads(1)
    if what == "make_model":
        make_model(folder)
        return
    from hydra import compose, initialize_config_dir

    from winnow import commands
    from winnow.build.command_settings import compression
    from winnow.core.cli import CONF

    settings = {
        "steps": STEPS,
        "stream": 200,
        "tokens_per_batch": 256,
        "tokens_per_device": 128,
        "max_length": 64,
        "precision": "32-true",
        "save_dtype": "float32",
        "checkpoint_minutes": 0.001,
    }
    overrides = ["model=local", f"model.path={folder / 'model'}", "method=[pretrain]", "wandb.mode=disabled"]
    overrides += [f"method.pretrain.{name}={value}" for name, value in settings.items()]
    overrides += [f"output={folder / run / 'artifact'}", f"outputs={folder / run / 'outputs'}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    commands.compress(compression(cfg, "train"))


def make_model(folder: Path) -> None:
    """A random Llama with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.model.lm import LM
    from winnow.model.load import load_tokenizer
    from winnow.model.loading import Loading
    from winnow.model.save import save
    from winnow.nano.embedded import WEIGHTS

    tokenizer = load_tokenizer(str(WEIGHTS), Loading())
    torch.manual_seed(0)
    config = LlamaConfig(**{**MODEL, "vocab_size": len(tokenizer)}, tie_word_embeddings=True)
    save(LM(model=LlamaForCausalLM(config), tokenizer=tokenizer, name="tiny"), folder / "model")


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
