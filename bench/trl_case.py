"""The same LoRA training here and by TRL's SFTTrainer: useful tokens a second, peak memory, held-out loss.

    python bench/trl_case.py repeats=1

The same on both sides: the embedded model in single precision under bf16 autocast (on these processors faster than single
precision for both), the same fresh adapter of rank 16 on all linear layers of the blocks, the same token ids, the loss on
completions alone, about 2,048 useful tokens a step and as many of them at a time, AdamW with the same learning rate at every
step, clipping at 1, and as many steps. The documents are those that `calibration.source=nano` gives, what a user of the
embedded model trains on. They are short and much alike (12 to 89 tokens), so that TRL loses little to padding: the more
lengths differ, the more it loses.

TRL runs at its fastest setting that is correct: each of `SETTINGS` is tried for a few steps. Correct is one whose loss over some
documents is, in single precision, what the same model gives each of them alone; packing that lets documents see one another
is not. Not among them: Liger's and flash-attention's kernels, which need a GPU; and `torch_compile`, which takes minutes to
compile what trains in half of one, since batches differ in shape (it is off here as well).

Each run is a process of its own, in turn; what is timed is training, from the end of its first step. Memory is the peak resident
set from the start of the training on, libraries included. TRL is installed for this alone, into `outputs/bench/trl`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import REPOSITORY, Result, report

if TYPE_CHECKING:
    from winnow.data.encoding import Encoded
    from winnow.training.module import Schedule

PEER = "trl==1.16.0"
PACKAGES = REPOSITORY / "outputs" / "bench" / "trl"
TOKENS = 2048  # useful ones of an optimizer step, about
MAX_LENGTH = 512
STEPS, TRIAL_STEPS = 60, 8
HELD_OUT = 300
LEARNING_RATE, PRECISION = 1e-3, "bf16-mixed"
LEAK = 1e-3  # the relative difference of a correct loss: rounding is under 1e-5, another document's words over 1e-2

# What TRL is told; `parts` are the batches that a step's documents come in.
SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {"parts": 1},
    "padded, by length": {"parts": 1, "train_sampling_strategy": "group_by_length"},
    "padded, by length, 4 batches": {"parts": 4, "train_sampling_strategy": "group_by_length"},
    "padded, by length, 8 batches": {"parts": 8, "train_sampling_strategy": "group_by_length"},
    "padding-free, 4 batches": {"parts": 4, "padding_free": True, "max_length": None},
    "packed to 256": {"packing": True, "max_length": 256},
    "packed to 512": {"packing": True, "max_length": 512},
    "packed to 2048": {"packing": True, "max_length": 2048},
    "packed, wrapped": {"packing": True, "max_length": 512, "packing_strategy": "wrapped"},
}


@dataclass
class Clock:
    """When steps ended, and the useful tokens of each."""

    ends: list[float] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)

    def end(self) -> None:
        self.ends.append(time.perf_counter())

    def count(self, tokens: int) -> None:
        step = len(self.ends)
        self.tokens[step] = self.tokens.get(step, 0) + tokens

    @property
    def tokens_per_second(self) -> float:
        return sum(n for step, n in self.tokens.items() if step) / (self.ends[-1] - self.ends[0])


def documents(tokenizer: Any, steps: int) -> tuple[list[Encoded], list[Encoded]]:
    """To train on, rather more than the steps take; and to hold out."""
    from winnow.core.types import Calibration
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode

    rows = encode(documents(Calibration("nano"), HELD_OUT + steps * TOKENS // 30, 0), tokenizer, MAX_LENGTH)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def adapted_model() -> tuple[Any, Any]:
    import torch

    from winnow.method.lora import Lora, add_adapters
    from winnow.model.packing import cast_weights
    from winnow.model.pretrained import pretrained
    from winnow.nano.embedded import WEIGHTS

    lm = pretrained(str(WEIGHTS))
    cast_weights(lm.model, torch.float32)
    return add_adapters(lm.model, Lora(rank=16, alpha=32), seed=0), lm.tokenizer


def schedule(steps: int) -> Schedule:
    from winnow.training.module import Schedule

    return Schedule(LEARNING_RATE, steps, warmup=0.05, weight_decay=0.0)


def loss_alone(model: Any, rows: Sequence[Encoded]) -> float:
    """Mean over completion tokens, each document by itself, in single precision: the same code for both sides."""
    import torch

    from winnow.data.encoding import IGNORED, collate
    from winnow.training.losses import cross_entropy

    model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collate([row])
            chosen = batch["targets"] != IGNORED
            logits_nv = model(input_ids=batch["input_ids"], use_cache=False).logits[chosen].float()
            total += float(cross_entropy(logits_nv, batch["targets"][chosen]))
            targets += int(chosen.sum())
    return total / targets


def at_a_time(setting: str) -> int:
    """The tokens that TRL computes at once in a setting, about."""
    options = SETTINGS[setting]
    return TOKENS // options["parts"] if "parts" in options else min(TOKENS, options["max_length"])


def ours(model: Any, rows: list[Encoded], steps: int, folder: Path, clock: Clock, setting: str) -> None:
    from winnow.hardware.run import Run
    from winnow.training.fit import Batching, fit
    from winnow.training.objective import CrossEntropy

    class Counted(CrossEntropy):
        def __call__(self, student: Any, batch: dict[str, Any]) -> Any:
            clock.count(batch["input_ids"].numel())
            return super().__call__(student, batch)

    run = Run(folder, bars=False, curve=lambda step, figures: clock.end())
    batching = Batching(TOKENS, tokens_per_device=at_a_time(setting))
    fit(model, rows, schedule(steps), batching, run, precision=PRECISION, objective=Counted())


def sft_trainer(
    model: Any, tokenizer: Any, rows: list[Encoded], steps: int, folder: Path, clock: Clock, setting: str
) -> Any:
    import torch
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from winnow.data.encoding import IGNORED

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end()

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            clock.count(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    def labels(row: Encoded) -> list[int]:
        return [x if any(a <= i < b for a, b in row.answers) else IGNORED for i, x in enumerate(row.ids)]

    options = {"max_length": MAX_LENGTH, **SETTINGS[setting]}
    if "parts" in options:  # as many documents as have the tokens of a step, on average
        parts = options.pop("parts")
        per_step = TOKENS / statistics.mean(len(row.ids) for row in rows)
        options |= {"per_device_train_batch_size": round(per_step / parts), "gradient_accumulation_steps": parts}
    else:
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": TOKENS // options["max_length"]}
    config = SFTConfig(
        str(folder), max_steps=steps, bf16=PRECISION == "bf16-mixed", use_cpu=True, gradient_checkpointing=False,
        max_grad_norm=1.0, seed=0, save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return Counted(
        model,
        config,
        train_dataset=Dataset.from_list([{"input_ids": row.ids, "labels": labels(row)} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Ends()],
        optimizers=(optimizer, LambdaLR(optimizer, schedule(steps).factor)),
    )


def difference(model: Any, tokenizer: Any, rows: list[Encoded], folder: Path, setting: str) -> float:
    """Of the loss over all `rows` as TRL computes it from the loss of each alone, relative; in single precision."""
    import torch

    from winnow.data.encoding import IGNORED

    trainer = sft_trainer(copy.deepcopy(model), tokenizer, rows, 1, folder, Clock(), setting)
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(trainer.compute_loss(trainer.model, dict(batch))) * counted
            targets += counted
    if not targets:
        return 1.0
    expected = loss_alone(copy.deepcopy(model), rows)
    return abs(total / targets - expected) / expected


def one(side: str, setting: str, steps: int, check: bool) -> dict[str, float]:
    """In a process of its own: a training, its speed, its peak bytes and its held-out loss."""
    from winnow.hardware.footprint import PeakMemory

    model, tokenizer = adapted_model()
    rows, held_out = documents(tokenizer, steps)
    found, clock = {}, Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if side == "ours":
            import winnow.training.fit  # noqa: F401 (before the memory is looked at)

            work = functools.partial(ours, model, rows, steps, folder, clock, setting)
        else:
            if check:
                found["difference"] = difference(model, tokenizer, rows[:64], folder, setting)
            work = sft_trainer(model, tokenizer, rows, steps, folder, clock, setting).train
        with PeakMemory("cpu") as peak:
            work()
    found |= {"tokens_per_second": clock.tokens_per_second, "bytes": peak.peak_bytes}
    return found | {"tokens": sum(clock.tokens.values()), "loss": loss_alone(model, held_out)}


def child(side: str, setting: str = "", steps: int = STEPS, check: bool = False) -> dict[str, float] | str:
    """What `one` found, or the last line of its error."""
    environment = dict(os.environ)
    if side == "trl":
        paths = [str(PACKAGES), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    line = [sys.executable, str(Path(__file__)), "--one", json.dumps([side, setting, steps, check])]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def needed(found: dict[str, float] | str) -> dict[str, float]:
    if isinstance(found, str):
        raise SystemExit(f"bench/trl_case.py: a run failed: {found}")
    return found


def install() -> None:
    """TRL without its dependencies, which are here."""
    if not (PACKAGES / "trl").is_dir():
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PACKAGES), PEER]
        subprocess.run(line, check=True)


def fastest() -> str:
    """The setting in which TRL is correct, and takes the most useful tokens a second."""
    speeds = {}
    for setting in SETTINGS:
        found = child("trl", setting, TRIAL_STEPS, check=True)
        if isinstance(found, str):
            print(f"trl {setting:<30} out: {found}", flush=True)
            continue
        correct = found["difference"] <= LEAK
        if correct:
            speeds[setting] = found["tokens_per_second"]
        print(
            f"trl {setting:<30} {found['tokens_per_second']:8.0f} tokens/s  {found['bytes'] / 2**20:6.0f} MiB  "
            f"loss off by {found['difference']:.1e}{'' if correct else '  out: documents see one another'}",
            flush=True,
        )
    if not speeds:
        raise SystemExit("bench/trl_case.py: TRL is correct in no setting")
    return max(speeds, key=lambda setting: speeds[setting])


def measure(repeats: int) -> dict[str, float]:
    """Ratios of ours to TRL's: `speed` and `memory` of medians, `loss` of the held-out losses at the end."""
    install()
    setting = fastest()
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for repeat in range(repeats):
        for side in ("ours", "trl") if repeat % 2 == 0 else ("trl", "ours"):
            runs[side].append(needed(child(side, setting)))
    middle = {s: {k: statistics.median(run[k] for run in found) for k in found[0]} for s, found in runs.items()}
    for side, found in middle.items():
        how = f"{at_a_time(setting)} at a time" if side == "ours" else setting
        print(
            f"{side:<5} {how:<29} {found['tokens_per_second']:8.0f} tokens/s  "
            f"{found['bytes'] / 2**20:6.0f} MiB  held-out loss {found['loss']:.4f} after {found['tokens']:,.0f} tokens",
            flush=True,
        )
    a, b = middle["ours"], middle["trl"]
    names = {"speed": "tokens_per_second", "memory": "bytes", "loss": "loss"}
    return {name: a[key] / b[key] for name, key in names.items()}


def main(arguments: list[str]) -> None:
    settings = {"repeats": "5"} | dict(argument.split("=", 1) for argument in arguments)
    found = measure(int(settings["repeats"]))
    report(
        "trl_case",
        [
            Result("speed_vs_trl", found["speed"], 1.3, "higher"),
            Result("memory_vs_trl", found["memory"], 1.0, "lower"),
            Result("loss_vs_trl", found["loss"], 1.01, "lower"),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
