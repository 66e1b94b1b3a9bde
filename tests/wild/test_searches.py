"""Searches as people set them: limits that nothing meets, seeds and numbers that mean nothing, figures that are no numbers."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agent import world
from tests.search.test_loop import Found, outcome
from tests.test_conf import composed
from winnow.agent.gp import GP
from winnow.agent.samplers import NSGA2, TPE, Grid, Random
from winnow.build.command_settings import compression
from winnow.study.budget import Budget
from winnow.study.policy import Policy
from winnow.study.study import Proposal

POLICIES: dict[str, Callable[[], Policy]] = {"random": Random, "grid": Grid, "tpe": TPE, "nsga2": NSGA2, "gp": GP}


@pytest.mark.parametrize("policy", POLICIES)
def test_where_everything_is_refused_the_search_ends_and_says_why(
    policy: str, tmp_path: Path, log_lines: list[str]
) -> None:
    def asked(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"refusal": "size_bytes would be about 2e6, over constraints.size_bytes=1000"} for _ in strategies]

    found = Found(tmp_path, asked=asked, budget=Budget(trials=3), space=world.spacious(), policy=POLICIES[policy]())
    found.search.run()
    assert found.launched == ["base"]
    assert len(found.study.trials) < 100
    assert "nothing that can be proposed is allowed" in log_lines[-1] or "nothing" in "".join(log_lines)
    assert any("by constraints.size_bytes=1000" in line for line in log_lines), log_lines


def test_one_possible_strategy_among_many_is_found(tmp_path: Path) -> None:
    def asked(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{} if s["methods"] == ["nf4"] else {"refusal": "too large"} for s in strategies]

    found = Found(tmp_path, asked=asked, budget=Budget(trials=2), space=world.spacious(), policy=Grid())
    found.search.run()
    assert found.launched == ["base", "nf4"]


@pytest.mark.parametrize(("policy", "value"), [*((policy, math.nan) for policy in POLICIES), ("tpe", math.inf)])
def test_figures_that_are_no_numbers_stop_no_agent(policy: str, value: float, tmp_path: Path) -> None:
    def launch(proposal: Proposal, worker: int) -> dict[str, Any]:
        bad = {"accuracy": value, "size_bytes": 1e6, "kl_to_base": value}
        plain = world.figures(proposal.strategy) | {"kl_to_base": value if proposal.number % 2 else 0.1}
        return outcome(proposal, figures=bad if proposal.number in (2, 4) else plain)

    for trials in (8, 11):  # and when it goes on
        found = Found(tmp_path, launch, budget=Budget(trials=trials), space=world.spacious(), policy=POLICIES[policy]())
        found.search.run()
    assert [t.number for t in found.study.trials if t.failed] == [2, 4]
    assert len(found.study.trials) == 11


@pytest.mark.parametrize(
    ("scripts", "setting"),
    [
        (("search", "compress"), "seed=-1"),
        (("search", "compress"), "seed=4294967296"),
        (("search",), "agent.seed=-1"),
        (("search", "evaluate"), "benchmark.seed=-1"),
        (("search",), "convergence=0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    command: Callable[..., Any], tmp_path: Path, scripts: tuple[str, ...], setting: str
) -> None:
    for script in scripts:
        done = command(script, setting)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert setting in done.stderr and "give" in done.stderr
        assert not (tmp_path / "outputs").exists()


def test_a_search_that_could_confirm_on_no_item_does_not_begin(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("search", "method=[rtn]", "confirm=1e-9")
    assert done.returncode == 2 and "none is left to confirm on" in done.stderr, done.stderr
    assert "raise confirm, or set confirm=0" in done.stderr and not (tmp_path / "outputs").exists()


def test_two_processes_do_not_make_the_same_artifact(command: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["method=[magnitude]", f"output={tmp_path / 'artifact'}"]
    scratch = compression(composed("compress", *arguments, f"outputs={tmp_path / 'outputs'}")).scratch
    scratch.mkdir(parents=True)
    (scratch / "half-made").touch()
    other = os.open(scratch, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    done = command("compress", *arguments)
    assert done.returncode == 2 and "is being made by another process" in done.stderr, done.stderr
    assert (scratch / "half-made").exists()
    os.close(other)
    assert command("compress", *arguments).returncode == 0
    assert not (tmp_path / "outputs").exists()
