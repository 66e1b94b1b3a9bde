"""Random models, pipelines, settings and damage: every run ends in a right artifact, or in one line that says what is wrong.

    python bench/fuzz.py minutes=60 seed=1     # draws case after case; each has a seed of its own, printed with how it ended
    python bench/fuzz.py case=17               # that one again, with all that it prints

A case is one `compress.py`, or the forecast of a `search.py` whose space is narrowed, in a fork of this process. It is right where
it ended

- with 0: there is a forecast; or the artifact loads, its logits are those that the model in memory had, and its size is the
  predicted one;
- with 2: in one message, nothing left of the artifact, no scratch folder, and no stage had done its work already, except where
  only that work could tell.

Anything else is a finding: a traceback, a method that changed nothing, a folder left behind, a wrong artifact, hours lost.
"""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, report, show_progress
from damages import damages

sys.path.insert(0, str(REPOSITORY))

SIZE = 1.05  # the size that is made over that which was predicted, at most; small files are mostly headers
CLOSE = 0.03  # logits of the artifact and of the model in memory, as a share of the largest
CLOSE_OF_EXPERTS = 0.08  # in memory each expert is computed by itself, loaded all together: they round otherwise
SECONDS = 240  # that a case may take
SEEN_LATE = (
    "is worse than",
    "has changed no weight",
    "would be held out",
    "NaN or infinity",
)  # what only the work of the stages before can tell
SHORT = {"steps": 2, "tokens_per_batch": 128, "max_length": 32, "iters": 2, "grid": 3, "rounds": 1, "tokens": 4}
METHODS = (
    *(
        "magnitude",
        "wanda",
        "sparsegpt",
        "depth",
        "width",
        "lowrank",
        "progressive",
        "lora",
        "distill",
        "rtn",
        "gptq",
        "awq",
    ),
    *("mixed", "autoround", "smoothquant", "fp8", "nf4", "fp4", "int8", "gguf", "qlora", "kv", "soft_prompt"),
)


@dataclass(frozen=True)
class Case:
    """What is drawn for a seed.

    Attributes:
        changes: of the family's usual configuration.
        damage: by its name in `damages`, or `none`.
        command: `compress` or `search`.
        overrides: of it, without the model's folder and the output.
    """

    seed: int
    family: str
    changes: Mapping[str, Any]
    damage: str
    command: str
    overrides: tuple[str, ...]


def drawn(seed: int) -> Case:
    from tests.wild.architectures import ARCHITECTURES

    rng = random.Random(seed)
    usual = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral", "qwen3_moe")
    family = rng.choice(usual) if rng.random() < 0.7 else rng.choice(list(ARCHITECTURES))
    damage = rng.choice(list(damages())) if rng.random() < 0.3 else "none"
    command = "search" if rng.random() < 0.2 else "compress"
    overrides = _narrowed(rng) if command == "search" else _pipeline(rng)
    return Case(seed, family, _shape(rng, ARCHITECTURES[family]), damage, command, tuple(overrides))


def _shape(rng: random.Random, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Odd sizes, for families whose configuration has the usual names."""
    if "intermediate_size" not in usual or rng.random() < 0.2:
        return {}
    head, heads = rng.choice((16, 24, 32, 64)), rng.choice((1, 2, 3, 4, 6))
    changes: dict[str, Any] = {
        "hidden_size": head * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "intermediate_size": rng.choice((33, 64, 96, 100, 128, 200, 256)),
        "num_hidden_layers": rng.choice((1, 2, 3)),
        "tie_word_embeddings": rng.random() < 0.5,
        "max_position_embeddings": rng.choice((48, 128, 512)),
    }
    if "head_dim" in usual:
        changes["head_dim"] = rng.choice((head, 32))
    if "layer_types" in usual:
        changes["layer_types"] = [rng.choice(("sliding_attention", "full_attention")) for _ in range(3)]
        changes["layer_types"] = changes["layer_types"][: changes["num_hidden_layers"]]
    for name in ("attention_bias", "mlp_bias"):
        if rng.random() < 0.2:
            changes[name] = True
    return changes


def _pipeline(rng: random.Random) -> list[str]:
    """One to three methods, mostly in a right order, with knobs from the ranges that they state, mostly."""

    from winnow.core.targets import target_of
    from winnow.method.knobs import knobs_of

    classes = {name: target_of(_node(name)) for name in METHODS}
    chosen = rng.sample(METHODS, rng.choice((1, 1, 1, 2, 2, 3)))
    if rng.random() < 0.9:
        chosen.sort(key=lambda name: classes[name].slot)
        chosen = [n for i, n in enumerate(chosen) if i == 0 or classes[n].slot != classes[chosen[i - 1]].slot]
    overrides = [f"method=[{','.join(chosen)}]"]
    for name in chosen:
        fields = classes[name].__dataclass_fields__
        overrides += [f"method.{name}.{field}={value}" for field, value in SHORT.items() if field in fields]
        for field, knob in knobs_of(classes[name]).items():
            if field in SHORT or rng.random() < 0.6:
                continue
            value = rng.choice(knob.choices) if knob.choices else _number(rng, knob)
            overrides.append(f"method.{name}.{field}={str(value).lower() if isinstance(value, bool) else value}")
    if rng.random() < 0.1:
        overrides.append(f"seed={rng.choice((-1, 0, 7, 2**32 - 1, 2**32))}")
    if rng.random() < 0.2:
        overrides.append(f"model.dtype={rng.choice(('float32', 'bfloat16', 'float16'))}")
    if rng.random() < 0.2:
        overrides.append(f"hardware.dtype={rng.choice(('float32', 'bfloat16'))}")
    return overrides


def _narrowed(rng: random.Random) -> list[str]:
    """A space of some methods, with knobs fixed, narrowed to choices or to an interval, now and then beyond what they take."""

    from winnow.core.targets import target_of
    from winnow.method.knobs import knobs_of

    chosen = rng.sample(METHODS, rng.choice((1, 2, 4, 8)))
    overrides = [f"method=[{','.join(chosen)}]", "dry_run=true"]
    for name in chosen:
        for field, knob in knobs_of(target_of(_node(name))).items():
            kind = rng.randrange(8)
            key = f"method.{name}.{field}"
            if knob.choices and kind < 3:
                some = rng.sample(knob.choices, rng.randint(1, len(knob.choices)))
                overrides.append(
                    f"{key}=choice({','.join(str(v).lower() if isinstance(v, bool) else str(v) for v in some)})"
                )
            elif not knob.choices and kind < 3:
                low, high = knob.search_range or (knob.low, knob.high)
                ends = sorted(rng.uniform(low, high) for _ in range(2))
                overrides.append(f"{key}=interval({ends[0]:.4g},{ends[1]:.4g})")
            elif kind == 3 and rng.random() < 0.2:
                overrides.append(
                    f"{key}={rng.choice(('x', '-1', '1e9', 'null', 'interval(3,1)', 'choice(a,b)', '[1,2]'))}"
                )
    return overrides


def _number(rng: random.Random, knob: Any) -> float | int:
    low, high = knob.search_range or (knob.low, knob.high)
    value = rng.uniform(low, high)
    return round(value) if isinstance(low, int) and isinstance(high, int) else round(value, 4)


def _node(name: str) -> str:
    from omegaconf import OmegaConf

    from winnow.core.cli import CONF

    return str(OmegaConf.load(CONF / "method" / f"{name}.yaml")["_target_"])


def attempt(case: Case, folder: Path, said: Path) -> None:
    """In a fork: makes the model, damages it, compresses it, looks at what came of it; ends the process with the exit code.

    200: there is no such model. 3 and more: a finding, which is the last line of `said`.
    """
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    show_progress()
    from tests.wild.architectures import random_model

    base, output = folder / "base", folder / "artifact"
    try:
        random_model(case.family, base, **case.changes)
    except Exception:
        traceback.print_exc()
        os._exit(200)
    if case.damage != "none":
        try:
            damages()[case.damage](base, random.Random(case.seed))
        except FileNotFoundError:
            os._exit(200)
    code = _compressed(case, base, output, seen := [])  # type: ignore[var-annotated]
    sys.stdout.flush()
    sys.stderr.flush()
    print()
    if code == 0 and case.command == "compress":
        finding = _wrong(output, base, case, seen)
    else:
        left = [p.name for p in folder.iterdir() if p.name not in ("base", "outputs", "said.txt")]
        left += [str(p) for p in (folder / "outputs").rglob("*") if p.is_file() and "cache" not in p.parts]
        finding = f"left behind: {left}" if left else ""
        text = said.read_text(encoding="utf-8", errors="replace")
        if code == 2 and ": done in " in text and not any(words in text for words in SEEN_LATE):
            finding = f"refused after a stage was done: {text.strip().splitlines()[-1]}"
        if code not in (0, 2):
            finding = f"exit code {code}, a traceback"
    if finding:
        print(finding, flush=True)
        os._exit(3)
    os._exit(code)


def _compressed(case: Case, base: Path, output: Path, seen: list[Any]) -> int:
    """The command in this process; its exit code."""
    import runpy

    from tests.method.test_conformance import look_before_saving

    sys.argv = [f"{case.command}.py", "model=local", f"model.path={base}", *case.overrides]
    sys.argv += [f"outputs={output.parent / 'outputs'}", "calibration.source=nano", "calibration.samples=4"]
    sys.argv += ["calibration.max_length=64"]
    if case.command == "compress":
        sys.argv += [f"output={output}", "hydra.run.dir=.", "hydra.output_subdir=null", "hydra.job.chdir=false"]
        sys.argv += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    try:
        with look_before_saving(seen):
            runpy.run_path(str(REPOSITORY / f"{case.command}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wrong(output: Path, base: Path, case: Case, seen: list[Any]) -> str:
    """What is wrong with an artifact; empty where it is right."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from tests.method.test_conformance import logits

    from winnow import build
    from winnow.core.cli import CONF
    from winnow.estimate.layout import layout_of
    from winnow.model import manifest
    from winnow.model.pretrained import pretrained

    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("compress", ["model=local", f"model.path={base}", *case.overrides])
        lm = build.model(cfg)
        plan = layout_of(lm)
        for stage in build.stages(cfg).values():
            plan = stage.predict(plan)
        size = manifest.sizes(output)["size_bytes"]
        if abs(size - plan.disk_bytes) > max(plan.disk_bytes * (SIZE - 1), 20_000):
            return f"{size:,} bytes, predicted were {plan.disk_bytes:,}"
        if not json.loads((output / manifest.NAME).read_text(encoding="utf-8"))["runtimes"]:
            return "no runtime serves it"
        if seen and not list(output.glob("*.gguf")):
            if not _runs(base):
                return ""
            loaded, expected = logits(pretrained(str(output), dtype=lm.loading.dtype)), seen[-1]
            off, scale = (loaded - expected).abs().max().item(), expected.abs().max().item()
            experts = "experts" in " ".join(name for name, _ in lm.model.named_modules())
            if not off <= (CLOSE_OF_EXPERTS if experts else CLOSE) * scale:
                return f"logits differ by {off:.3g} of {scale:.3g}"
    except Exception:
        return traceback.format_exc()
    return ""


def _runs(base: Path) -> bool:
    """Whether the base model computes at all in its own type: transformers' products of experts take no odd sizes."""
    from tests.method.test_conformance import logits

    from winnow.model.pretrained import pretrained

    try:
        logits(pretrained(str(base)))
    except RuntimeError:
        return False
    return True


def run(case: Case, show: bool = False) -> tuple[str, str]:
    """How a case ended, in a word, and what it said last."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    said = folder / "said.txt"
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(case, folder, said))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    text = said.read_text(encoding="utf-8", errors="replace") if said.is_file() else ""
    shutil.rmtree(folder, ignore_errors=True)
    if show:
        print(text)
    lines = [line for line in text.splitlines() if line.strip()]
    last = " | ".join(lines[-1:])
    ends = {0: "made", 2: "refused", 200: "no such model", -9: "FINDING: out of time"}
    return ends.get(process.exitcode or 0, f"FINDING: {process.exitcode}"), last


def preload() -> None:
    """Imports once what every case would import for itself."""
    import importlib

    from winnow.core.targets import target_of

    importlib.import_module("winnow.search.preload")
    for module in sorted({module for name in METHODS for module in target_of(_node(name)).preload}):
        with contextlib.suppress(ImportError):  # a case says so
            importlib.import_module(module)


def main(options: Mapping[str, str]) -> None:
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    preload()

    if "case" in options:
        case = drawn(int(options["case"]))
        print(case)
        print(*run(case, show=True))
        return
    number = int(options.get("seed", "0")) * 100_000
    until, ends, findings = time.monotonic() + 60 * float(options.get("minutes", "60")), collections.Counter[str](), []
    while time.monotonic() < until:
        case = drawn(number)
        end, last = run(case)
        ends[end.partition(":")[0]] += 1
        print(
            f"{case.seed} {end} | {case.family} {case.damage} {case.command} {' '.join(case.overrides)} | {last[:300]}",
            flush=True,
        )
        if end.startswith("FINDING"):
            findings.append(case.seed)
        number += 1
    print(dict(ends), "findings:", findings)
    with contextlib.suppress(ZeroDivisionError):
        report("fuzz", [Result("runs", sum(ends.values()), 1, "higher"), Result("findings", len(findings), 0, "lower")])


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
