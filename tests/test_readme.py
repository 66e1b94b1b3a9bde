"""The README's commands are run: with the embedded model for real, but on few items; the others are composed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.quick import MEASUREMENTS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
PYTHON = [line for line in LINES if re.match(r"(\w+=\S+ )*(python|torchrun \S+) \w+\.py", line)]
QUICK = ["benchmark.limit=4", *MEASUREMENTS]


def parts(line: str) -> tuple[str, list[str]]:
    words = shlex.split(line, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script].removesuffix(".py"), words[script + 1 :]


def test_the_readme_shows_commands() -> None:
    assert {parts(line)[0] for line in PYTHON} >= {"compress", "evaluate", "search", "train"}
    assert {"make search", "make test"} <= set(LINES)


@pytest.mark.parametrize("line", PYTHON)
def test_each_command_composes(command, line: str) -> None:
    script, arguments = parts(line)
    if "--help" not in arguments:
        # Hydra does not print a configuration with sweeps in it; the test below runs those lines
        kept = [a for a in arguments if "(" not in a and a not in ("--cfg", "job", "--resolve")]
        arguments = [*kept, "--cfg", "job", "--resolve"]
    ended = command(script, *arguments)
    assert ended.returncode == 0, ended.stderr


def runs_here(line: str) -> bool:
    elsewhere = (
        "torchrun",
        "FOLDER",
        "smollm2",
        "experiment=",
        "--",
        "hardware=",
        "wandb.mode=online",
        "benchmark=",
        "hours",
        "agent=gpt4o",
        "agent=local_llm",
        "agent=replay",
        "hydra/launcher",
        "storage=",
        "/",
    )
    return not any(word in line for word in elsewhere)


@pytest.mark.parametrize("line", [line for line in PYTHON if runs_here(line)])
def test_each_command_on_the_embedded_model_runs(command, line: str) -> None:
    script, arguments = parts(line)
    if script == "search":
        arguments += [*QUICK, "budget.trials=2", "wandb.mode=disabled"]
    elif script == "evaluate":
        arguments += QUICK
    if script in ("compress", "search"):
        arguments.append("calibration.samples=8")
    arguments += [
        f"method.{name}.steps=2" for name in ("lora", "qlora", "distill") if re.search(rf"[\[,]{name}\b", line)
    ]
    ended = command(script, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
