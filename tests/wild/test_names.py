"""Names of studies and folders as people give them: what is accepted comes back the same from every place it is written to."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.agent import world
from tests.conftest import REPOSITORY
from tests.quick import MEASUREMENTS
from tests.started import run
from winnow.core import grammar
from winnow.core.types import Strategy
from winnow.search.overrides import command_lines
from winnow.study.opening import open_study
from winnow.study.storage import sqlite_file, sqlite_url

NAMES = [
    "plain", "a b", " a ", "a#b", "a?b=c&d", "100%", "a%20b", "a,b", "[a]", "{a}", "a=b", "a'b", 'a"b', "a\\b", "a\\'b", "(a)",
    "ü", "日本", "$HOME", "`id`", "a;b", "a|b", "a*b", "~a", "!a", "-a", "+a", "null", "true", "1e5", "007", "1:2", "nan", "a@b:c",
]  # fmt: skip


def parsed(override: str) -> Any:
    (found,) = OverridesParser.create().parse_overrides([override])
    return found.value()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_same_after_hydra_has_read_it(name: str) -> None:
    for text in (name, f"/data/{name}/x", name + "/"):
        for written in (grammar.quoted_path(text), grammar.quoted(text)):
            found = parsed(f"key={written}")
            assert str(found) == text and isinstance(found, str), written
    assert parsed(f"key={grammar.quoted([name, {'x': name}, 3, None, True])}") == [name, {"x": name}, 3, None, True]


def test_plain_paths_stay_plain() -> None:
    assert grammar.quoted_path("/data/my-model_2/v1.5") == "/data/my-model_2/v1.5"


@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_found_again_in_a_folder_of_this_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    url = sqlite_url(tmp_path / name / "study.db")
    assert sqlite_file(url) == tmp_path / name / "study.db"
    open_study(name, url, world.OBJECTIVES, {"model": {"name": "m"}}).close()
    assert open_study(name, url, world.OBJECTIVES, {"model": {"name": "m"}}).name == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert all(path.name.startswith("study.db") for path in (tmp_path / name).iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_printed_lines_can_be_pasted(name: str, tmp_path: Path) -> None:
    for line in command_lines([], Strategy(("rtn",), {"method.rtn.bits": 4}), Path("/out") / name):
        echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
        words = echoed.stdout.split("\0")[:-1]
        assert words == shlex.split(line)
        paths = [parsed(word) for word in words[2:] if word.startswith(("output=", "model.path="))]
        assert paths == [f"/out/{name}/artifact"]


@pytest.mark.slow
def test_a_whole_search_under_a_name_that_means_something_to_everybody(tmp_path: Path) -> None:
    name = "a b,[c]=d#e?f%20g'h"
    outputs = tmp_path / "o,u=t"
    settings = [
        f"study={grammar.quoted(name)}",
        f"outputs={grammar.quoted_path(outputs)}",
        "method=[rtn]",
        "benchmark.limit=2",
    ]
    done = run("search.py", *settings, *MEASUREMENTS, "budget.trials=2", "keep=all", "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in outputs.iterdir() if path.name != "cache"] == [name]
    results = json.loads((outputs / name / "final_results.json").read_text())
    for line in results["trials"][1]["commands"]:
        more = "" if "compress" in line else f" outputs={shlex.quote(str(tmp_path / 'elsewhere'))}"
        pasted = subprocess.run(
            ["bash", "-c", line + more], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert pasted.returncode == 0, pasted.stderr
