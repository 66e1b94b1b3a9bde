"""A fixed list of strategies: as it says, once, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.agent import world
from tests.test_conf import composed
from winnow.agent.recipe import Recipe, read_recipe
from winnow.core.errors import UserError
from winnow.study.policy import Exhausted
from winnow.study.space import read_space


def recipe(lines: Sequence[Sequence[str]], **configured: Any) -> Recipe:
    return read_recipe(lines, world.spacious(), lambda key: configured.get(key.rpartition(".")[2]))


def test_it_is_run_in_order_and_to_its_end() -> None:
    policy = recipe([["method=[rtn]", "method.rtn.bits=3"], ["method=[nf4]"]], group_size=64)
    history = world.searched(policy, world.spacious(), 3)
    assert [str(t.strategy) for t in history.trials] == ["base", "rtn(bits=3, group_size=64)", "nf4"]
    with pytest.raises(Exhausted):
        policy.ask(history, world.spacious(), world.Known())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["method=[gptq]"], r"give method=\[...\] with some of wanda, lora, rtn, nf4"),
        (["method.rtn.bits=4"], r"give method=\[...\]"),
        (["method=[rtn]", "method.rtn.bits=5"], r"method\.rtn\.bits=5 is not in the space"),
        (["method=[nf4]", "method.rtn.bits=4"], "belongs to none of its methods"),
        (["method=[rtn]", "model=other"], "model belongs to none of its methods"),
    ],
)
def test_what_is_not_of_the_space_is_refused(line: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe([line], bits=4, group_size=64)


@pytest.mark.parametrize("name", ["conservative", "aggressive", "baseline"])
def test_the_experiments_are_recipes(name: str) -> None:
    cfg = composed("search", f"experiment={name}")
    space = read_space(OmegaConf.to_container(cfg.method, resolve=True), {})
    found = read_recipe(cfg.recipe, space, lambda key: OmegaConf.select(cfg, key))
    assert len({s.overrides for s in found.strategies}) == len(cfg.recipe) >= 5
