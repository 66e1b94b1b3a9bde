"""Every method on a tiny random model of every architecture of `tests/wild/architectures.py`, really applied.

    python bench/architectures.py                          # writes docs/architectures.json and docs/architectures.md
    python bench/architectures.py only=mixtral,gpt2 methods=rtn,lora
    python bench/architectures.py page                     # writes docs/architectures.md only

An artifact counts where it was saved, loaded back, predicts as the model in memory did, and has the predicted size.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import REPOSITORY, Result, report

sys.path.insert(0, str(REPOSITORY))
from tests.logged import logged
from tests.wild.architectures import ARCHITECTURES, random_model

FIGURES, PAGE = REPOSITORY / "docs" / "architectures.json", REPOSITORY / "docs" / "architectures.md"
SHORT = {"steps": 2, "tokens_per_batch": 256, "max_length": 64, "iters": 2, "grid": 3, "tokens": 4, "rounds": 1}
CLOSE = 0.02  # logits of the artifact and of the model in memory, as a share of the largest
CLOSE_BESIDE_EXPERTS = 0.08  # where transformers does not round activations as the format asks
SIZE = 1.05  # the size that is made over that which was predicted, at most


def stages() -> dict[str, Any]:
    """Of every option of `conf/method`, with settings that are quick."""
    from hydra import compose, initialize_config_dir

    from winnow import build
    from winnow.core.cli import CONF
    from winnow.method.knobs import knobs_of

    names = [p.stem for p in sorted((CONF / "method").glob("*.yaml")) if p.stem != "pretrain"]
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in names:
            whole = build.stages(compose("compress", [f"method=[{name}]"]))[name]
            short = [f"method.{name}.{k}={v}" for k, v in SHORT.items() if k in vars(whole)]
            short += ["method.mixed.bits=3.5"] if name == "mixed" else []  # which always beats 3 bits everywhere
            short += ["method.distill.student={num_hidden_layers: 1}"] if name == "distill" else []
            found[name] = build.stages(compose("compress", [f"method=[{name}]", *short]))[name]
    assert all(knobs_of(type(stage)) is not None for stage in found.values())
    return found


def outcome(folder: Path, name: str, stage: Any, scratch: Path) -> str:
    """`yes`, or why not in one line; a traceback is a defect."""
    from tests.method.test_conformance import logits, look_before_saving

    from winnow.core.errors import UserError
    from winnow.core.types import Calibration
    from winnow.estimate.layout import layout_of
    from winnow.hardware.run import Run
    from winnow.method import pipeline, suitability
    from winnow.model import manifest
    from winnow.model.matrix_kinds import EXPERT
    from winnow.model.pretrained import pretrained

    seen: list[Any] = []
    run = Run(scratch, calibration=Calibration("nano", samples=4, max_length=64))
    try:
        lm = pretrained(str(folder))
        plan = layout_of(lm)
        suitability.check({name: stage}, plan.tensors, plan.spec.name)
        predicted = stage.predict(plan).disk_bytes
        with look_before_saving(seen), logged() as said:
            made = pipeline.compress(lm, {name: stage}, run, scratch / "artifact")
        size = manifest.sizes(scratch / "artifact")["size_bytes"]
        if not predicted / SIZE <= size <= predicted * SIZE:
            return f"DEFECT: {size:,} bytes, predicted were {predicted:,}"
        if "transformers" not in made.manifest.get("runtimes", {}) and name != "gguf":
            return f"DEFECT: not served: {made.manifest.get('runtimes')}, {said[-2:]}"
        if seen and name != "gguf":
            loaded = logits(pretrained(str(scratch / "artifact")))
            experts = any(t.matrix_kind == EXPERT for t in plan.tensors.values())
            close = CLOSE_BESIDE_EXPERTS if name == "fp8" and experts else CLOSE
            if (loaded - seen[-1]).abs().max() > close * seen[-1].abs().max():
                return f"DEFECT: logits differ by {(loaded - seen[-1]).abs().max():.3g} of {seen[-1].abs().max():.3g}"
        return "yes"
    except UserError as error:
        return str(error).replace(str(folder), "FOLDER").replace(str(scratch), "FOLDER")
    except Exception:
        return "DEFECT: " + traceback.format_exc()[-1500:]


def table(held: Mapping[str, Mapping[str, str]]) -> str:
    """`docs/architectures.md`."""
    methods = list(next(iter(held.values())))
    reasons: dict[str, str] = {}  # the first of each kind
    for text in (text for row in held.values() for text in row.values() if text != "yes"):
        reasons.setdefault(_kind(text), text)
    numbers = {kind: number for number, kind in enumerate(reasons, 1)}
    lines = [
        "# Which methods suit which architecture\n",
        "Made by `python bench/architectures.py` from `docs/architectures.json`: each method was applied to a tiny random model of",
        "each architecture, by transformers' `model_type`, saved, loaded back and compared with the model in memory. **yes**: it",
        "works. A number: it is refused, for a reason like the one below the table.\n",
        f"| | {' | '.join(methods)} |",
        f"|---|{':---:|' * len(methods)}",
    ]
    for family, row in held.items():
        cells = ["yes" if row[name] == "yes" else f"{numbers[_kind(row[name])]}" for name in methods]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons.values(), 1)), ""])


def _kind(text: str) -> str:
    """A refusal without the names of the method, of the architecture and of what its blocks are made of, and without numbers."""
    text = re.sub(r"method[=.]\[?\w+\]?(\.\w+)?", "method", text)
    text = re.sub(
        r"\b[A-Z]\w+(ForCausalLM|LMHeadModel)\b|(?<=this )\w+|(?<=a model of type )\w+|(?<=; not )\w+", "it", text
    )
    return re.sub(r"differ in.*|`\w+`|\d[\d.,]*", "#", text)


def main(arguments: list[str]) -> None:
    if arguments != ["page"]:
        measure({k: v.split(",") for k, v in (a.split("=") for a in arguments)})
    held = json.loads(FIGURES.read_text(encoding="utf-8"))
    PAGE.write_text(table(held), encoding="utf-8")
    found = [text for row in held.values() for text in row.values()]
    defects = sum(text.startswith("DEFECT") for text in found)
    report("architectures", [Result("defects", defects, 0, "lower"), Result("works", found.count("yes"), 1, "higher")])


def measure(options: Mapping[str, Sequence[str]]) -> None:
    held = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    chosen = stages()
    for family in options.get("only", ARCHITECTURES):
        with tempfile.TemporaryDirectory() as name:
            try:
                folder = random_model(family, Path(name) / "base")
            except Exception as error:
                print(family, "cannot be made:", error, flush=True)
                continue
            for method in options.get("methods", chosen):
                with tempfile.TemporaryDirectory() as scratch:
                    found = outcome(folder, method, chosen[method], Path(scratch))
                held.setdefault(family, {})[method] = found
                print(family, method, found, flush=True)
        ordered = {name: held[name] for name in ARCHITECTURES if name in held}
        FIGURES.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
