"""`docs/methods.md`: every method as its class describes it, with what it made of the embedded model.

    python bench/methods_page.py             # measures what is not measured yet, a setting at a time, and writes the page
    python bench/methods_page.py gptq awq    # measures these anew
    python bench/methods_page.py --page      # writes the page only

The figures stand in `docs/methods.json`, each setting's as `compress.py` and `evaluate.py` gave them in processes of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.cli import CONF, options
from winnow.core.types import Slot, Strategy
from winnow.method.knobs import knobs_of

DOCS = CONF.parent / "docs"
FIGURES, PAGE = DOCS / "methods.json", DOCS / "methods.md"
LABELS = ("Source", "Calibration", "Cost", "Writes", "Loaded by")
NOT_MEASURED = ("pretrain",)  # makes the embedded model
COMPARED = ("rtn", "gptq", "awq", "autoround")  # at equal bits and group size, and `mixed` at as many on average
FEW_BITS, GROUP_SIZE = (3, 2), 64
KEPT = ("size_bytes", "accuracy", "perplexity", "latency_ms", "weights_memory_bytes")

INTRODUCTION = """\
# Methods

Made by `python bench/methods_page.py` from `conf/method/*.yaml`, the classes they name, and `docs/methods.json`.

Each stage is measured alone on the embedded model, at its defaults and at its most aggressive setting, without recovery, and
what recovers after something to recover from; knobs that differ from the defaults are named:
all items of its five benchmarks (accuracy is the mean of their scores), its held-out text (perplexity), one request of 32 + 32
tokens (latency), and the seconds that compressing took. Made of full-precision weights by `compress.py`, loaded back and
evaluated by `evaluate.py`, {machine}. A setting that does not serve says why.
"""


def classes() -> dict[str, Any]:
    """The class of each method, by the name of its option, in the order of slots."""
    from omegaconf import OmegaConf

    from winnow.core.targets import target_of

    found = {}
    for name in options("method"):
        node: Any = OmegaConf.load(CONF / "method" / f"{name}.yaml")
        found[name] = target_of(node["_target_"])
    return dict(sorted(found.items(), key=lambda item: (item[1].slot, item[0])))


def settings() -> dict[str, Strategy]:
    """What is measured, by its overrides: the base, each method at its defaults and at its most aggressive knobs."""
    found = [Strategy()]
    for name, stage in classes().items():
        if name not in NOT_MEASURED:
            shown = {f"method.{name}.{k}": v for k, v in stage.measured_with.items()}
            if stage.measured_after:
                found.append(Strategy(stage.measured_after))
            found.append(Strategy((*stage.measured_after, name), shown))
            if stage.aggressive:
                most = {f"method.{name}.{k}": v for k, v in stage.aggressive.items()}
                found.append(Strategy((*stage.measured_after, name), shown | most))
    found += [strategy for bits in FEW_BITS for strategy in compared(bits)]
    return {" ".join(strategy.overrides): strategy for strategy in found}


def compared(bits: int) -> list[Strategy]:
    """The settings that make files of one size: `bits` in groups of 64, by the methods that offer it."""
    found = [
        Strategy((name,), {f"method.{name}.bits": bits, f"method.{name}.group_size": GROUP_SIZE}) for name in COMPARED
    ]
    return [*found, Strategy(("mixed",), {"method.mixed.bits": float(bits)})] if bits > 2 else found


def measure(again: Sequence[str] = ()) -> dict[str, Any]:
    """Measures every setting that `docs/methods.json` does not hold, or that is one of a method in `again`."""
    from hydra import compose, initialize_config_dir

    from winnow.build.job_settings import job_settings
    from winnow.hardware.inventory import cpu_model
    from winnow.search import fork_server, trial

    held = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    figures = {k: v for k, v in held.get("figures", {}).items() if k in settings()}
    fork_server.start_server()
    for key, strategy in settings().items():
        if key in figures and not set(strategy.methods) & set(again):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("search", [*strategy.overrides, f"outputs={scratch}", "study=methods"])
            outcome = trial.run(job_settings(cfg), strategy.overrides, Path(scratch))
        found = {name: outcome["figures"][name] for name in KEPT if name in outcome["figures"]}
        message = outcome["message"].replace(f"{Path(scratch) / 'artifact'}: ", "")
        figures[key] = {**found, "seconds": outcome["seconds"].get("compress"), "message": message}
        print(key, figures[key], flush=True)
        content = {"machine": f"on {cpu_model()}, {_cores()} cores", "figures": figures}
        FIGURES.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figures


def _cores() -> int:
    from winnow.hardware.inventory import available_cores

    return available_cores()


def page(held: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    figures = held["figures"]
    parts = [INTRODUCTION.format(machine=held["machine"]), _table(figures), _equal_size(figures)]
    for slot in Slot:
        members = {name: stage for name, stage in classes().items() if stage.slot == slot}
        if members:
            parts.append(f"## {slot.name.capitalize()}\n")
            parts += [_section(name, stage) for name, stage in members.items()]
    return "\n".join(parts)


def _table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    base = figures[" ".join(Strategy().overrides)]
    lines = [
        "| setting | size | of base | accuracy | perplexity | latency | compressing |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, strategy in settings().items():
        found = figures.get(key)
        if found is None:
            lines.append(f"| {strategy} | not measured | | | | | |")
        elif found["message"]:
            lines.append(f"| {strategy} | {found['message']} | | | | | |")
        else:
            share = found["size_bytes"] / base["size_bytes"]
            lines.append(
                f"| {strategy} | {found['size_bytes'] / 1e6:.2f} MB | {share:.2f}x | {found['accuracy']:.3f} "
                f"| {found['perplexity']:.3f} | {found['latency_ms']:.0f} ms | {found['seconds']:.1f} s |"
            )
    return "\n".join(lines) + "\n"


def _equal_size(figures: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "## At equal size\n",
        f"Groups of {GROUP_SIZE}. What a method gains on rounding to nearest, as the difference in perplexity (less is better):\n",
        "| bits | method | size | perplexity | against `rtn` | accuracy |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for bits in FEW_BITS:
        plain = figures[" ".join(compared(bits)[0].overrides)]["perplexity"]
        for strategy in compared(bits):
            found = figures[" ".join(strategy.overrides)]
            lines.append(
                f"| {bits} | `{strategy.methods[0]}` | {found['size_bytes'] / 1e6:.3f} MB | {found['perplexity']:.4f} "
                f"| {found['perplexity'] - plain:+.4f} | {found['accuracy']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def _section(name: str, stage: Any) -> str:
    text, labelled = described(stage)
    lines = [f"### `{name}`\n", f"{text}\n"]
    lines += [f"- **{label}**: {labelled[label]}" for label in LABELS if label in labelled]
    knobs = knobs_of(stage)
    if knobs:
        defaults = {f.name: f.default for f in dataclasses.fields(stage)}
        lines += ["", "| knob | default | takes | searched |", "|---|---|---|---|"]
        for knob_name, knob in knobs.items():
            searched = "yes" if knob.search else "no"
            lines.append(f"| `{knob_name}` | {defaults[knob_name]} | {knob} | {searched} |")
    return "\n".join(lines) + "\n"


def described(stage: type) -> tuple[str, dict[str, str]]:
    """The prose of a class's docstring, and its labelled lines (`LABELS`)."""
    text = inspect.getdoc(stage) or ""
    pattern = re.compile(rf"^({'|'.join(LABELS)}): ", re.MULTILINE)
    starts = [*pattern.finditer(text)]
    prose = text[: starts[0].start()] if starts else text
    prose = re.split(r"^(?:Attributes|Raises|Args):\s*$", prose, flags=re.MULTILINE)[0]
    ends = [*(match.start() for match in starts[1:]), *([len(text)] if starts else [])]
    labelled = {m[1]: _joined(text[m.end() : end]) for m, end in zip(starts, ends, strict=True)}
    return "\n\n".join(_joined(paragraph) for paragraph in prose.strip().split("\n\n")), labelled


def _joined(text: str) -> str:
    text = re.split(r"^(?:Attributes|Raises|Args):\s*$", text, flags=re.MULTILINE)[0]
    return " ".join(text.split())


def main(arguments: Sequence[str]) -> None:
    if "--page" not in arguments:
        measure(arguments)
    PAGE.write_text(page(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
