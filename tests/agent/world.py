"""A small space with a known answer, in which agents are tried: figures follow from the strategy alone, at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from winnow.core.errors import Reason
from winnow.core.types import Strategy, Trial
from winnow.method.knobs import Knob
from winnow.study.costs import Costs
from winnow.study.history import History
from winnow.study.objectives import KNOWN
from winnow.study.policy import Policy, Suggestion
from winnow.study.space import Space, read_space

METHODS = {
    "wanda": {"_target_": "winnow.method.prune.Wanda", "sparsity": 0.5, "pattern": "unstructured"},
    "lora": {"_target_": "winnow.method.lora.Lora", "rank": 16, "learning_rate": 1e-3},
    "rtn": {"_target_": "winnow.method.rtn.RTN", "bits": 4, "group_size": 64},
    "nf4": {"_target_": "winnow.method.bnb.NF4"},
}
OBJECTIVES = (KNOWN["accuracy"], KNOWN["size_bytes"])


def spacious() -> Space:
    """Ranges and knobs that depend on others among its dimensions."""
    return read_space(METHODS, {})


def narrow() -> Space:
    """30 strategies."""
    fixed = {"method.wanda.pattern": "unstructured", "method.wanda.allocation": "uniform"}
    choices = {"method.wanda.sparsity": (0.3, 0.6), "method.rtn.group_size": (32, 128), "method.rtn.bits": (2, 3, 4, 8)}
    chosen = {key: Knob(choices=values) for key, values in choices.items()}
    return read_space({name: METHODS[name] for name in ("wanda", "rtn", "nf4")}, fixed | chosen)


def figures(strategy: Strategy) -> dict[str, float]:
    """Pruning costs accuracy and recovery wins most of it back; fewer bits cost accuracy and bytes."""
    knobs = {key.rpartition(".")[2]: value for key, value in strategy.knobs.items()}
    lost, size = 0.0, 16.0
    if "wanda" in strategy.methods:
        sparsity = float(knobs.get("sparsity", 0.5))
        lost += 0.5 * sparsity**4 * (0.3 if "lora" in strategy.methods else 1.0)
        size -= 2 * sparsity
    elif "lora" in strategy.methods:
        lost += 0.01
    if "rtn" in strategy.methods:
        lost += {2: 0.25, 3: 0.03, 4: 0.008, 8: 0.0}[int(knobs["bits"])] * (1 + int(knobs["group_size"]) / 256)
        size = size * (int(knobs["bits"]) + 32 / int(knobs["group_size"])) / 16
    elif "nf4" in strategy.methods:
        lost, size = lost + 0.006, size * 0.27
    return {"accuracy": 0.95 - lost, "size_bytes": size * 1e6}


@dataclass
class Known:
    """An outlook that knows sizes, and refuses what it is told to."""

    refused: frozenset[str] = frozenset()  # methods
    costs: Costs = field(default_factory=Costs)

    def figures(self, strategies: Sequence[Strategy]) -> list[Mapping[str, float]]:
        return [{"size_bytes": figures(strategy)["size_bytes"]} for strategy in strategies]

    def infeasible_reason(self, strategy: Strategy) -> str:
        bad = sorted(self.refused & set(strategy.methods))
        return f"{bad[0]} does not fit" if bad else ""

    def seconds(self, strategy: Strategy) -> float:
        return self.costs.seconds(strategy)

    def observe(self, trial: Trial) -> None:
        self.costs.observe(trial)


def ended(number: int, suggestion: Suggestion, failing: frozenset[str] = frozenset()) -> Trial:
    """The trial of a suggestion; those with a method of `failing` crash."""
    strategy = suggestion.strategy
    bad = failing & set(strategy.methods)
    stages = [{"method": name, "seconds": 2.0, "reused": False} for name in strategy.methods]
    return Trial(
        number,
        strategy,
        figures={} if bad else figures(strategy),
        reason=Reason.CRASHED if bad else None,
        seconds={"compress": 2.0 * len(stages), "evaluate": 5.0, "total": 5.0 + 2.0 * len(stages)},
        stages=stages,
        proposed_by=suggestion.by,
        decision={"why": suggestion.why, **suggestion.record},
    )


def searched(
    policy: Policy, space: Space, trials: int, outlook: Known | None = None, failing: frozenset[str] = frozenset()
) -> History:
    """A history of so many trials, the base model first."""
    history, outlook = History(OBJECTIVES), outlook or Known()
    for number in range(trials):
        suggestion = policy.ask(history, space, outlook) if number else Suggestion(Strategy(), "base")
        history.begin(number, suggestion.strategy)
        trial = ended(number, suggestion, failing)
        history.end(trial)
        outlook.observe(trial)
    return history
