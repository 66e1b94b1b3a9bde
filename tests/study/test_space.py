"""The space: read from the methods, narrowed on the command line, drawn from, enumerated."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.search import overrides
from winnow.study.space import read_space

METHODS = {
    "wanda": {"_target_": "winnow.method.prune.Wanda", "sparsity": 0.5, "pattern": "unstructured"},
    "magnitude": {"_target_": "winnow.method.prune.Magnitude", "sparsity": 0.5, "pattern": "unstructured"},
    "rtn": {"_target_": "winnow.method.rtn.RTN", "bits": 4, "group_size": 64},
    "nf4": {"_target_": "winnow.method.bnb.NF4"},
}


def space_of(*arguments: str, methods=METHODS):
    return read_space(methods, overrides.parse(arguments).narrowed)


def test_a_strategy_has_at_most_one_method_a_slot_and_only_its_own_knobs() -> None:
    space, study = space_of(), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.draw(study.ask()) for _ in range(200)]
    assert {len(s.methods) for s in drawn} == {0, 1, 2}
    for strategy in drawn:
        assert not {"wanda", "magnitude"} <= set(strategy.methods)
        assert not {"rtn", "nf4"} <= set(strategy.methods)
        assert {key.split(".")[1] for key in strategy.knobs} <= set(strategy.methods)
        for method in set(strategy.methods) & {"wanda", "magnitude"}:
            unstructured = strategy.knobs[f"method.{method}.pattern"] == "unstructured"
            assert (f"method.{method}.sparsity" in strategy.knobs) == unstructured


def test_the_grid_is_every_strategy_once() -> None:
    found = list(space_of().all(points=3))
    assert found[0] == Strategy()
    assert len({s.overrides for s in found}) == len(found)
    prune = 1 + 2 * (3 * 3 + 2)  # none, or two methods with 3 sparsities in 3 allocations, or one of two patterns
    quantize = 1 + 4 * 3 + 1
    assert len(found) == prune * quantize


@pytest.mark.parametrize(
    ("argument", "allowed"),
    [
        ("method.rtn.bits=choice(3,4)", {3, 4}),
        ("method.rtn.bits=3,4", {3, 4}),
        ("method.rtn.bits=2", {2}),
        ("method.rtn.bits=interval(3,8)", {3, 4, 8}),
        ("method.rtn.bits=range(2,5)", {2, 3, 4}),
    ],
)
def test_choices_are_narrowed_in_hydras_grammar(argument: str, allowed: set[int]) -> None:
    found = {s.knobs["method.rtn.bits"] for s in space_of(argument).all(2) if "rtn" in s.methods}
    assert found == allowed


def test_an_interval_narrows_a_number() -> None:
    space = space_of("method.wanda.sparsity=interval(0.2,0.6)")
    found = [s.knobs["method.wanda.sparsity"] for s in space.all(5) if "method.wanda.sparsity" in s.knobs]
    assert (min(found), max(found)) == (0.2, 0.6)


def test_a_fixed_pattern_takes_the_sparsity_out_of_the_space() -> None:
    space = space_of("method.wanda.pattern=2:4")
    assert [d.key for d in space.method("wanda").dimensions] == ["method.wanda.pattern"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.rtn.bits=choice(4,5)"], r"method\.rtn\.bits=5 is out of range: it takes one of 2, 3, 4, 8"),
        (["method.wanda.sparsity=interval(0.2,1.5)"], r"interval\(0\.2,1\.5\) is out of range"),
        (["method.rtn.bits=interval(5,7)"], "leaves nothing"),
        (["method.rtn.depth=3"], r"method\.rtn\.depth: there is no such knob"),
        (["model=a,b"], "one search for each model"),
        (["method=choice(rtn,nf4)"], "list the methods"),
    ],
)
def test_bad_narrowings_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(*arguments)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(UserError, match="the space is empty"):
        space_of(methods={})


def test_any_strategy_can_be_asked_for_by_its_parameters() -> None:
    space = space_of()
    for strategy in list(space.all(2))[::7]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.enqueue_trial(space.parameters(strategy))
        assert space.draw(study.ask()) == strategy


def test_command_lines_carry_the_settings_and_quote_for_a_shell() -> None:
    strategy = Strategy(("wanda", "rtn"), {"method.wanda.pattern": "2:4", "method.rtn.bits": 3})
    shared = ["model=nano", "model.dtype=float32", "benchmark.limit=10", "hardware=cpu", "budget.trials=3", "seed=4"]
    compress, evaluate = overrides.command_lines(shared, strategy, Path("outputs/s/trials/1"))
    assert compress == (
        "python compress.py model=nano model.dtype=float32 hardware=cpu seed=4 'method=[wanda,rtn]' method.rtn.bits=3 "
        "method.wanda.pattern=2:4 output=outputs/s/trials/1/artifact"
    )
    assert evaluate == (
        "python evaluate.py model=local model.path=outputs/s/trials/1/artifact model.dtype=float32 benchmark.limit=10 "
        "hardware=cpu seed=4"
    )
