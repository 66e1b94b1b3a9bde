"""What every method makes of the embedded model, and how well that answers: to see whether a change of the code changed it.

    python bench/artifacts.py > before.json                   # in a checkout from before the change
    python bench/artifacts.py than=before.json                # after it: names what is another one
    python bench/artifacts.py tree=FOLDER methods=rtn+wanda,lora  # another checkout, some methods

Only the commands are called, so that one version of this script looks at any version of the code. A method's artifact is known
by the hash of its weights' files, its answers by the accuracy on a fixed part of the embedded benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, report

SHORT = {"steps": 10, "tokens_per_batch": 512, "iters": 10, "grid": 5, "rounds": 2}  # of methods that have such a knob
PIPELINES = ("wanda,lora", "depth,distill", "nf4,qlora", "lora,gptq", "rtn,soft_prompt", "magnitude,rtn,kv")
CALIBRATION = ("calibration.samples=32", "calibration.max_length=128")
WEIGHTS = (".safetensors", ".gguf")


def knobs(tree: Path, method: str) -> list[str]:
    settings = called(tree, "compress.py", f"method=[{method}]", "--cfg", "job", "--package", f"method.{method}")
    return [f"method.{method}.{name}={value}" for name, value in SHORT.items() if f"\n{name}:" in settings]


def called(tree: Path, *line: str) -> str:
    """What a command of this tree prints.

    Raises:
        SystemExit: it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *line], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def looked_at(tree: Path, methods: str) -> dict[str, Any]:
    """The hash of the weights of what a pipeline makes, and its accuracy."""
    with tempfile.TemporaryDirectory() as name:
        folder, artifact = Path(name), Path(name) / "artifact"
        settings = [setting for method in methods.split(",") for setting in knobs(tree, method)]
        settings += ["method.distill.student={num_hidden_layers: 4}"] if methods == "distill" else []
        places = [f"outputs={folder}", f"output={artifact}"]
        called(tree, "compress.py", f"method=[{methods}]", *settings, *CALIBRATION, *places)
        digest = hashlib.sha256()
        for file in sorted(file for file in artifact.rglob("*") if file.suffix in WEIGHTS):
            digest.update(file.relative_to(artifact).as_posix().encode() + file.read_bytes())
        metrics = folder / "metrics"
        quick = ["hardware.seconds=0.1", "hardware.repeats=1", "hardware.warmup=0", "hardware.energy_seconds=0.1"]
        line = [
            "model=local",
            f"model.path={artifact}",
            "benchmark.limit=40",
            *quick,
            f"outputs={folder}",
            f"output={metrics}",
        ]
        called(tree, "evaluate.py", *line)
        figures = json.loads((metrics / "metrics.json").read_text(encoding="utf-8"))["figures"]
    return {"weights_sha256": digest.hexdigest(), "accuracy": figures["accuracy"]}


def main(options: dict[str, str]) -> None:
    tree = Path(options.get("tree", REPOSITORY)).resolve()
    there = sorted(path.stem for path in (tree / "conf" / "method").glob("*.yaml") if path.stem != "pretrain")
    chosen = options["methods"].split("+") if "methods" in options else [*there, *PIPELINES]
    before = json.loads(Path(options["than"]).read_text(encoding="utf-8")) if "than" in options else {}
    found: dict[str, Any] = {}
    for methods in chosen:
        found[methods] = looked_at(tree, methods)
        same = {True: "as before", False: f"ANOTHER ONE, was {before.get(methods)}"}[
            found[methods] == before.get(methods)
        ]
        print(methods, found[methods], same if before else "", file=sys.stderr, flush=True)
    if not before:
        print(json.dumps(found, indent=1))
        return
    others = sum(found[methods] != before.get(methods) for methods in chosen)
    report("artifacts", [Result("changed", others, 0, "lower")])


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
