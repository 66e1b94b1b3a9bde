"""What is known before a strategy runs: sizes that come true, refusals with their reason, and costs that learn."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.agent import world
from tests.test_conf import composed
from winnow.core.types import Strategy, Trial
from winnow.search.forecaster import Forecasts, forecaster, smallest
from winnow.study.costs import Costs


def answers(*overrides: str) -> Any:
    settings = OmegaConf.to_container(composed("search", *overrides), resolve=True)
    return forecaster(settings)  # type: ignore[arg-type]


def test_the_embedded_models_sizes_are_known_and_what_cannot_be_is_refused() -> None:
    answer = answers("method=[wanda,rtn,gptq]")
    asked = [
        {"methods": [], "knobs": {}},
        {"methods": ["rtn"], "knobs": {"method.rtn.bits": 4, "method.rtn.group_size": 128}},
        {"methods": ["wanda", "rtn"], "knobs": {"method.wanda.sparsity": 0.5, "method.rtn.bits": 2}},
        {"methods": ["rtn", "wanda"], "knobs": {}},
    ]
    base, four, two, wrong = answer(asked)
    assert base["figures"]["size_bytes"] == pytest.approx(9.11e6, rel=0.03)
    assert four["figures"]["size_bytes"] == pytest.approx(2.80e6, rel=0.03)
    assert two["figures"]["size_bytes"] < four["figures"]["size_bytes"] and not two["refusal"]
    assert "wanda (prune) cannot come after rtn" in wrong["refusal"]


def test_what_does_not_fit_the_hardware_is_refused() -> None:
    answer = answers("method=[rtn]", "hardware.memory_limit_bytes=200000000")
    (found,) = answer([{"methods": ["rtn"], "knobs": {"method.rtn.bits": 4}}])
    assert found["refusal"]


def test_a_constraint_refuses_what_is_sure_to_break_it_and_asks_once() -> None:
    calls: list[int] = []

    def ask(strategies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        calls.append(len(strategies))
        sizes = [2.0e6 if "nf4" in s["methods"] else 1.02e6 for s in strategies]
        return [{"figures": {"size_bytes": size}, "estimates": {"peak_memory_bytes": 9e9}} for size in sizes]

    small, large = Strategy(("rtn",)), Strategy(("nf4",))
    outlook = Forecasts(ask, {"size_bytes": 1e6})
    assert outlook.figures([small, large, small])[1] == {"size_bytes": 2.0e6}
    assert outlook.infeasible_reason(small) == "" and "size_bytes would be about 2e+06" in outlook.infeasible_reason(
        large
    )
    assert calls == [2]
    assert Forecasts(ask, {"peak_memory_bytes": 8e9}).infeasible_reason(small) == ""  # memory is an estimate
    assert "peak_memory_bytes" in Forecasts(ask, {"peak_memory_bytes": 6e9}).infeasible_reason(small)


def made(
    number: int, methods: tuple[str, ...], knobs: dict[str, Any], reused: int = 0, evaluate: float = 10.0
) -> Trial:
    seconds = {"wanda": 3.0, "lora": 60.0, "rtn": 1.0}
    stages = [{"method": m, "seconds": seconds[m], "reused": n < reused} for n, m in enumerate(methods)]
    figures = world.figures(Strategy())
    return Trial(number, Strategy(methods, knobs), figures=figures, stages=stages, seconds={"evaluate": evaluate})


def test_the_smallest_come_first_and_what_cannot_be_made_not_at_all() -> None:
    sizes = {"rtn": 3.0, "nf4": 1.0, "int8": 5.0, "awq": 2.0, "kv": None}

    def answer(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = [(s["methods"][0], sizes[s["methods"][0]]) for s in asked]
        return [
            {"figures": {} if size is None else {"size_bytes": size}, "refusal": "no" if name == "awq" else ""}
            for name, size in known
        ]

    made = [Strategy((name,)) for name in sizes]
    found = [s.methods[0] for s in smallest(made, Forecasts(answer), 9)]
    assert found == ["nf4", "rtn", "int8", "kv"]  # of unknown size: last
    assert [s.methods[0] for s in smallest(made, Forecasts(answer), 2)] == ["nf4", "rtn"]


def test_costs_are_those_of_what_has_to_be_done() -> None:
    costs = Costs()
    pruned = {"method.wanda.sparsity": 0.5, "method.lora.rank": 8}
    costs.observe(made(1, ("wanda", "lora", "rtn"), {**pruned, "method.rtn.bits": 4}))
    again = Strategy(("wanda", "lora", "rtn"), {**pruned, "method.rtn.bits": 3})
    other = Strategy(("wanda", "lora", "rtn"), {**pruned, "method.wanda.sparsity": 0.6, "method.rtn.bits": 3})
    assert costs.seconds(again) == pytest.approx(1.0 + 10.0)  # pruned and recovered already
    assert costs.seconds(other) == pytest.approx(64.0 + 10.0)
    costs.observe(made(2, ("wanda", "lora", "rtn"), {**pruned, "method.rtn.bits": 3}, reused=2, evaluate=20.0))
    assert costs.seconds(other) == pytest.approx(64.0 + 15.0)


def test_what_is_not_kept_costs_again() -> None:
    trial = Trial(
        1,
        Strategy(("wanda",)),
        stages=[{"method": "wanda", "seconds": 40.0, "reused": False}],
        seconds={"evaluate": 2.0},
    )
    for cached, expected in ((True, 2.0), (False, 42.0)):
        costs = Costs(cached)
        costs.observe(trial)
        assert costs.seconds(Strategy(("wanda",))) == expected
