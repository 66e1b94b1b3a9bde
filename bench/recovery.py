"""Training here against the plain way, against itself on two processes, and against TRL; what recovery wins back.

    python bench/recovery.py                        # on 2 cores: about an hour
    python bench/recovery.py only=chunked,packed    # some of it
    python bench/recovery.py device=cuda tflops=989 # tokens/s, MFU, peak memory of LoRA and QLoRA in the shape of an 8B model

`packed_vs_padded`: useful tokens/s on documents of skewed lengths, packed against padded to the longest of a batch.
`chunked_*`: the loss over a vocabulary of 128 thousand in chunks against all logits at once: peak memory (plain / chunked), and
time (chunked / plain). `cached_vs_online`: steps/s with a teacher's stored targets against the teacher itself, 8 times the
student's size. `ddp_gradient_difference`: two processes against one. `*_vs_trl`: against TRL's SFTTrainer. `*_recovery`: the
share of the accuracy lost to pruning that the embedded model gets back, all test items. `survived_kills`: of 20 SIGKILLs, those
after which the training went on to the weights, bit for bit, of one that was left alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, command, report

VOCABULARY, HIDDEN, POSITIONS = 128_000, 512, 2048
REPEATS = 5


# packed against padded


def skewed_rows(count: int = 512) -> list[Any]:
    """Documents of random tokens: four in five of 16 to 64, one in five of up to 512, as instructions and answers are."""
    import random

    from winnow.data.encoding import Encoded

    rng = random.Random(0)
    lengths = [rng.randint(16, 64) if rng.random() < 0.8 else rng.randint(128, 512) for _ in range(count)]
    return [Encoded([rng.randrange(4, 1000) for _ in range(n)], ((1, n),)) for n in lengths]


def small_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens_per_second(layout: str, steps: int = 8, tokens: int = 2048) -> float:
    """Useful tokens/s of full training steps in bf16 autocast; batches of about as many useful tokens in both layouts."""
    import random

    import torch

    from winnow.data.encoding import collate, collate_padded
    from winnow.training.objective import CrossEntropy
    from winnow.training.packed_rows import pack
    from winnow.training.student import Student

    rows = skewed_rows()
    lengths = [len(row.ids) for row in rows]
    if layout == "packed":
        groups = list(pack(lengths, tokens, 0, 0))
    else:  # in a random order, as a collator pads them
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        size = max(1, round(tokens / statistics.mean(lengths)))
        groups = [order[i : i + size] for i in range(0, len(order), size)]
    student, objective = Student(small_llama()), CrossEntropy()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    started, useful = 0.0, 0
    for step, group in enumerate(groups[: steps + 2]):
        if step == 2:  # two to warm up
            started, useful = time.perf_counter(), 0
        chosen = [rows[i] for i in group]
        batch = collate(chosen) if layout == "packed" else collate_padded(chosen, 0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(student, batch) / sum(row.target_count for row in chosen)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        useful += sum(lengths[i] for i in group)
    return useful / (time.perf_counter() - started)


def packed() -> list[Result]:
    return [Result("packed_vs_padded", ratio(lambda side: child("packed", side), "packed", "padded"), 1.8, "higher")]


# losses in chunks


def one_loss(kind: str, side: str) -> dict[str, float]:
    """Seconds and peak bytes, above what was there before, of one loss and its gradients."""
    import torch

    from winnow.hardware.footprint import PeakMemory
    from winnow.training import losses

    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    head = losses.Head(torch.randn(VOCABULARY, HIDDEN).mul_(0.02))
    compute = losses.chunked if side == "chunked" else losses.unchunked
    if kind == "ce":
        targets = torch.randint(VOCABULARY, (POSITIONS,))

        def work() -> Any:
            return compute(losses.cross_entropy, hidden, head, targets)
    else:
        taught, teacher = torch.randn(POSITIONS, HIDDEN), losses.Head(torch.randn(VOCABULARY, HIDDEN).mul_(0.02))

        def divergence(student_nv: Any, taught_nh: Any) -> Any:
            with torch.no_grad():
                teacher_nv = teacher(taught_nh)
            return losses.forward_kl(student_nv, teacher_nv)

        def work() -> Any:
            return compute(divergence, hidden, head, taught)

    losses.chunked(
        losses.cross_entropy, hidden[:8], head, torch.zeros(8, dtype=torch.long)
    ).backward()  # libraries warm
    hidden.grad = None
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with PeakMemory("cpu") as peak:
        started = time.perf_counter()
        work().backward()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak.peak_bytes - resident}


def chunked() -> list[Result]:
    found = []
    times = []
    for kind, target in (("kl", 6.0), ("ce", 4.0)):
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "chunked": []}
        for repeat in range(REPEATS):
            for side in alternating(repeat, "plain", "chunked"):
                runs[side].append(child("one_loss", kind, side))
        middle = {s: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for s, rs in runs.items()}
        for side, figures in middle.items():
            print(f"{kind} {side:<8} {figures['seconds']:7.2f} s  {figures['bytes'] / 2**20:8.0f} MiB", flush=True)
        times.append(middle["chunked"]["seconds"] / middle["plain"]["seconds"])
        found.append(
            Result(f"chunked_{kind}_memory", middle["plain"]["bytes"] / middle["chunked"]["bytes"], target, "higher")
        )
    return [*found, Result("chunked_time", max(times), 1.1, "lower")]


# teachers, devices, kills, TRL: each in a file of its own


def cached() -> list[Result]:
    import teacher_case

    speeds, cosines = zip(*(teacher_case.measure_cached_vs_online() for _ in range(REPEATS)), strict=True)
    return [
        Result("cached_vs_online", statistics.median(speeds), 2.5, "higher"),
        Result("cached_gradient_cosine", min(cosines), 0.99, "higher"),
    ]


def ddp() -> list[Result]:
    import ddp_case

    return [Result("ddp_gradient_difference", ddp_case.measure(), 1e-6, "lower")]


def kills() -> list[Result]:
    import kill_case

    return [Result("survived_kills", kill_case.measure(20)["survived"], 20, "higher")]


def trl() -> list[Result]:
    import trl_case

    found = trl_case.measure(REPEATS)
    return [
        Result("speed_vs_trl", found["speed"], 1.3, "higher"),
        Result("memory_vs_trl", found["memory"], 1.0, "lower"),
        Result("loss_vs_trl", found["loss"], 1.01, "lower"),
    ]


# what recovery wins back

# pruning alone, with recovery, minutes that pruning, recovery and saving may take, and the share to win back
RECIPES: dict[str, tuple[list[str], list[str], float, float]] = {
    "lora": (
        ["method=[wanda]", "method.wanda.sparsity=0.6"],
        [
            "method=[wanda,lora]", "method.wanda.sparsity=0.6", "method.lora.rank=32", "method.lora.learning_rate=0.003",
            "method.lora.steps=200",
        ],
        3.0,
        0.8,
    ),
    "distill": (
        ["method=[depth]", "method.depth.share=0.33"],
        [
            "method=[depth,distill]", "method.depth.share=0.33", "method.distill.learning_rate=0.0005",
            "method.distill.tokens_per_batch=2048", "method.distill.steps=1000",
        ],
        10.0,
        0.85,
    ),
}  # fmt: skip


def accuracy(folder: Path, *overrides: str) -> tuple[float, float]:
    """Accuracy of the embedded model after `compress.py <overrides>` on all test items, and the minutes that it took."""
    where = ["model=nano"]
    minutes = 0.0
    if overrides:
        artifact = folder / "-".join(str(abs(hash(o))) for o in overrides)[:60]
        started = time.perf_counter()
        command("compress.py", *overrides, f"output={artifact}", f"outputs={folder}")
        minutes = (time.perf_counter() - started) / 60
        where = ["model=local", f"model.path={artifact}"]
    output = folder / f"metrics-{len(list(folder.iterdir()))}"
    command("evaluate.py", *where, "benchmark=nano", f"output={output}", f"outputs={folder}")
    figures = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["figures"]
    return float(figures["accuracy"]), minutes


def recovery() -> list[Result]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, _ = accuracy(folder)
        print(f"base: accuracy {base:.3f}", flush=True)
        for recipe, (pruned, recovered, most_minutes, target) in RECIPES.items():
            low, _ = accuracy(folder, *pruned)
            back, minutes = accuracy(folder, *recovered)
            print(f"{' '.join(pruned)}: {low:.3f}; {' '.join(recovered)}: {back:.3f} in {minutes:.1f} min", flush=True)
            found += [
                Result(f"{recipe}_recovery", (back - low) / (base - low), target, "higher"),
                Result(f"{recipe}_minutes", minutes, most_minutes, "lower"),
            ]
    return found


# how measuring goes


def alternating(repeat: int, first: str, second: str) -> tuple[str, str]:
    return (first, second) if repeat % 2 == 0 else (second, first)


def ratio(measure: Callable[[str], float], over: str, under: str) -> float:
    """Of medians of runs in turn."""
    runs: dict[str, list[float]] = {over: [], under: []}
    for repeat in range(REPEATS):
        for side in alternating(repeat, over, under):
            runs[side].append(measure(side))
    middle = {side: statistics.median(found) for side, found in runs.items()}
    print(", ".join(f"{side} {value:,.0f}" for side, value in middle.items()), flush=True)
    return middle[over] / middle[under]


CHILDREN: dict[str, Callable[..., Any]] = {"packed": tokens_per_second, "one_loss": one_loss}


def child(*arguments: str) -> Any:
    """What one of `CHILDREN` finds in a process of its own."""
    line = [sys.executable, str(Path(__file__)), "--one", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


PARTS = {
    "packed": packed,
    "chunked": chunked,
    "cached": cached,
    "ddp": ddp,
    "kills": kills,
    "recovery": recovery,
    "trl": trl,
}


def main(arguments: list[str]) -> None:
    settings = {"device": "cpu", "only": ",".join(PARTS)}
    settings |= dict(argument.split("=", 1) for argument in arguments)
    if settings["device"] == "cuda":
        import recovery_cuda

        recovery_cuda.measure(float(settings["tflops"]) if "tflops" in settings else None)
        return
    report("recovery", [result for part in settings["only"].split(",") for result in PARTS[part]()])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main(sys.argv[1:])
