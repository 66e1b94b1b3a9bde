"""Spaces as people narrow them: whatever is drawn, tried first, recommended or proposed there can be reserved, composed and made."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.agent import world
from tests.test_conf import composed
from winnow import build
from winnow.agent.gp import GP
from winnow.agent.llm.critic import strategy_of
from winnow.agent.llm.schema import as_proposal
from winnow.agent.recipe import read_recipe
from winnow.agent.samplers import TPE, Grid
from winnow.build.search_settings import first_strategies
from winnow.core.cli import options
from winnow.core.errors import UserError
from winnow.core.targets import target_of
from winnow.core.types import Slot, Strategy, Trial
from winnow.method.knobs import knobs_of
from winnow.search import overrides
from winnow.study.history import History
from winnow.study.opening import open_study
from winnow.study.policy import Suggestion
from winnow.study.space import Space, read_space

SEEDS = range(6)


@functools.cache
def methods() -> dict[str, dict[str, Any]]:
    """All methods, as they are configured."""
    cfg = composed("search", f"method=[{','.join(name for name in options('method') if name != 'pretrain')}]")
    return OmegaConf.to_container(cfg.method, resolve=True)  # type: ignore[return-value]


def space_of(names: list[str], *arguments: str) -> Space:
    return read_space({name: methods()[name] for name in names}, overrides.parse(arguments).narrowed)


def configured(key: str) -> Any:
    _, method, setting = key.split(".")
    return methods()[method].get(setting)


def values_of(space: Space, method: str, setting: str) -> Any:
    """What a setting is in the space: its choices, its range, or its one value."""
    key = f"method.{method}.{setting}"
    for d in space.method(method).dimensions:
        if d.key == key:
            return d.choices or (d.low, d.high)
    return space.method(method).fixed.get(key, "not there")


ALLOWED = [
    ("mixed", "method.mixed.bits=interval(3.5,4.5)", "bits", (3.5, 4.5)),
    ("lora", "method.lora.steps=interval(50.5,200)", "steps", (51, 200)),
    ("lora", "method.lora.steps=range(20,50,10)", "steps", (20, 30, 40)),
    ("lora", "method.lora.steps=50.0", "steps", (50,)),
    ("lora", "method.lora.targets=[q_proj,v_proj]", "targets", ["q_proj", "v_proj"]),
    ("lora", "method.lora.targets=all", "targets", "not there"),  # its default
    ("distill", "method.distill.teacher_path=/data/a, b", "teacher_path", "/data/a, b"),
    ("distill", "method.distill.student={num_hidden_layers: 3}", "student", {"num_hidden_layers": 3}),
    ("soft_prompt", "method.soft_prompt.text='Think, then answer: \"yes\" or \\'no\\''", "text",
     "Think, then answer: \"yes\" or 'no'"),
    ("wanda", "method.wanda.pattern=choice(2:4,4:8)", "sparsity", "not there"),
    ("wanda", "method.wanda.pattern=choice(4:8,2:4)", "pattern", ("2:4", "4:8")),  # as the method has them
    ("wanda", "method.wanda.sparsity=range(0.1,0.5,0.1)", "sparsity", (0.1, 0.2, 0.3, 0.4)),
    ("rtn", "method.rtn.bits=choice(4,3,3)", "bits", (3, 4)),
    ("gguf", "method.gguf.dense=null", "dense", (None,)),
    ("kv", "method.kv.bits=16", "bits", (16,)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "argument", "setting", "expected"), ALLOWED, ids=lambda value: str(value)[:50])
def test_a_narrowing_means_what_it_says(method: str, argument: str, setting: str, expected: Any) -> None:
    if argument.startswith("method.distill.teacher_path"):
        argument = argument.replace("=", "='") + "'"
    space = space_of([method], argument)
    assert values_of(space, method, setting) == expected
    strategy = Strategy((method,), space.method(method).defaults(configured))
    assert not space.invalid_reason(strategy) and space.contains(strategy)
    stage = made(strategy)[method]
    if not isinstance(expected, tuple | str):
        assert getattr(stage, setting) in (expected, tuple(expected))


REFUSED = [
    ("lora", "method.lora.steps=interval(50.2,50.8)", "leaves nothing: it takes whole numbers from 1"),
    ("lora", "method.lora.steps=50.5", "out of range: it takes whole numbers"),
    ("mixed", "method.mixed.bits=interval(4.5,3.5)", r"write interval\(3.5,4.5\)"),
    ("mixed", "method.mixed.bits=interval(1,3)", "out of range: it takes from 2 to 8"),
    ("rtn", "method.rtn.bits=[3,4]", r"method\.rtn\.bits=choice\(3,4\)"),
    ("rtn", "method.rtn.bits=true", "out of range"),
    ("rtn", "method.rtn.bits=glob(*)", r"give values, e\.g\. method\.rtn\.bits=choice"),
    ("rtn", "~method.rtn.bits", "give values"),
    ("rtn", "method.gptq.bits=choice(3,4)", r"gptq is not among the methods; name it in method=\[...,gptq\]"),
    ("rtn", "+method.rtn.width=3", "no such knob; rtn has bits, group_size"),
    ("lora", "method.lora.targets=choice([q_proj],[v_proj])", "cannot be searched over; give one value"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "argument", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_narrowing_that_means_nothing_is_refused(method: str, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of([method], argument)


def test_a_knob_that_never_counts_is_refused() -> None:
    with pytest.raises(UserError, match=r"sparsity counts only with method\.wanda\.pattern=unstructured"):
        space_of(["wanda"], "method.wanda.pattern=choice(2:4,4:8)", "method.wanda.sparsity=interval(0.2,0.4)")


def test_what_an_experiment_configures_is_part_of_every_strategy() -> None:
    """Else trials with other settings would count as the same."""
    nodes = {"lora": {**methods()["lora"], "steps": 300}, "wanda": {**methods()["wanda"], "sparsity": 0.3}}
    space = read_space(nodes, {})
    for strategy in list(space.all(2))[1:]:
        assert ("method.lora.steps=300" in strategy.overrides) == ("lora" in strategy.methods)
        made(strategy)  # with 2:4, wanda takes no other sparsity than its default
    assert not space.contains(Strategy(("lora",), {"method.lora.rank": 16, "method.lora.learning_rate": 1e-3}))
    assert strategy_of(as_proposal(strategy)["methods"], space) == (strategy, [])


def test_an_experiments_settings_of_methods_that_are_left_out_do_not_count() -> None:
    for names in ([], ["gptq"], ["width", "lora"]):
        cfg = composed("search", "experiment=aggressive", f"method=[{','.join(names)}]")
        assert list(build.methods(cfg)) == names == list(build.stages(cfg))


def test_a_recipe_is_brought_into_the_space_and_says_so(log_lines: list[str]) -> None:
    space = space_of(["rtn", "mixed"], "method.rtn.bits=choice(3,4)", "method.mixed.bits=interval(3.5,4)")
    lines = [["method=[rtn]", "method.rtn.bits=2"], ["method=[mixed]", "method.mixed.bits=6"], ["method=[mixed]"]]
    found = read_recipe(lines, space, configured)
    assert [str(s) for s in found.strategies] == [
        "rtn(bits=3, group_size=64)", "mixed(bits=4, group_size=64)", "mixed(bits=3.5, group_size=64)"
    ]  # fmt: skip
    assert log_lines == [
        "recipe: method.rtn.bits=2 is not searched over; 3 takes its place",
        "recipe: method.mixed.bits=6 is not searched over; 4.0 takes its place",
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_strategy_of_a_space_can_be_tried(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    names = rng.sample(sorted(methods()), 4)
    arguments = [argument for name in names for argument in narrowings(name, rng)]
    space = space_of(names, *arguments)
    study = open_study("narrowed", f"sqlite:///{tmp_path / 'study.db'}", world.OBJECTIVES, {"model": {}})
    found = list(proposals(space, names, seed))
    for suggestion in found:
        strategy = suggestion.strategy
        assert not space.invalid_reason(strategy), (arguments, strategy)
        proposal = study.reserve(suggestion, space)
        assert proposal is not None and proposal.strategy.overrides == strategy.overrides
        assert strategy_of(as_proposal(strategy)["methods"], space)[1] == []
        made(strategy)
    study.close()
    if seed:  # composing takes longer than all the rest
        return
    longest = max((s.strategy for s in found), key=lambda s: len(s.knobs))
    cfg = composed("search", *overrides.parse(arguments).of_trial(longest))
    assert list(build.stages(cfg).values()) == list(made(longest).values())


def narrowings(name: str, rng: random.Random) -> Iterator[str]:
    """Some settings of a method, as somebody may type them."""
    knobs = knobs_of(target_of(methods()[name]["_target_"]))
    for setting, knob in knobs.items():
        key, kind = f"method.{name}.{setting}", rng.randrange(6)
        if knob.when or setting in ("teacher", "hidden_weight", "dense"):  # these clash with what others may be
            continue
        if knob.choices and kind in (0, 1):
            chosen = rng.sample(knob.choices, rng.randint(1, len(knob.choices)))
            yield f"{key}=choice({','.join(map(str, chosen))})" if len(chosen) > 1 else f"{key}={chosen[0]}"
        elif not knob.choices and kind in (0, 1, 2):
            low, high = knob.search_range or (knob.low, knob.high)
            ends = sorted(rng.uniform(low or 0, min(high or 0, 1000 * (low or 1))) for _ in range(2))
            ends[1] = min(ends[1] + knob.integer, high or 0)  # a whole number lies between
            yield f"{key}=interval({ends[0]},{ends[1]})"
    if name == "lora" and rng.random() < 0.7:
        yield "method.lora.targets=[q_proj,v_proj]"
    if name == "soft_prompt":
        yield "method.soft_prompt.text='Be brief, please: {x}'"


def proposals(space: Space, names: list[str], seed: int) -> Iterator[Suggestion]:
    """What is tried first, what recipes name, and what agents propose."""
    slots = [slot.name for slot in Slot]
    yield from (Suggestion(strategy, "first") for strategy in first_strategies(space, slots, configured))
    recipe = read_recipe([[f"method=[{name}]"] for name in names], space, configured)
    yield from (Suggestion(strategy, "recipe") for strategy in recipe.strategies)
    for policy in (TPE(seed=seed, startup_trials=2), GP(seed=seed, startup=2, pool=16), Grid(points=2)):
        history = History(world.OBJECTIVES)
        for number in range(4):
            suggestion = policy.ask(history, space, world.Known()) if number else Suggestion(Strategy(), "base")
            history.begin(number, suggestion.strategy)
            history.end(trial_of(number, suggestion))
            yield suggestion


def trial_of(number: int, suggestion: Suggestion) -> Any:
    figures = {"accuracy": 0.9 - 0.01 * number, "size_bytes": 1e6 - 1e4 * number}
    return Trial(number, suggestion.strategy, figures, seconds={"total": 1.0}, decision=suggestion.record)


def made(strategy: Strategy) -> dict[str, Any]:
    """The stages of a strategy, its overrides read by Hydra."""
    nodes = {name: dict(methods()[name]) for name in strategy.methods}
    for override in OverridesParser.create().parse_overrides(list(strategy.overrides)[1:]):
        _, method, setting = override.key_or_group.split(".")
        nodes[method][setting] = override.value()
    return {name: build.instantiate(OmegaConf.create(node), f"method.{name}") for name, node in nodes.items()}
