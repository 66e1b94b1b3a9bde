"""Sorts what the user typed after `search.py` into the space, and the settings that every trial shares."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.benchmark.order import FILE as ORDER
from winnow.core import grammar
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.method.knobs import Knob
from winnow.model.lm import LM

COMPRESS_KEYS = ("experiment", "debug", "model", "calibration", "seed", "hardware")
EVALUATE_KEYS = ("experiment", "debug", "model", "benchmark", "hardware", "seed")


@dataclass(frozen=True)
class Typed:
    """The command line of a search, parsed.

    Attributes:
        narrowed: settings of methods by key: a fixed value, or what is to be searched over as a `Knob`.
        shared: overrides of every trial, as typed.
    """

    narrowed: dict[str, Any]
    shared: tuple[str, ...]

    def of_trial(self, strategy: Strategy) -> list[str]:
        """All overrides of one trial's configuration."""
        return [*self.shared, *strategy.overrides]

    def pinned(self, lm: LM) -> Typed:
        """The same with the base model where it lies now: of a GGUF file what was made of it, whatever becomes of the file."""
        values = {"model.path": str(lm.path), "model.name": lm.name}
        added = [f"{key}={grammar.text_of(text)}" for key, text in values.items()]
        kept = [override for override in self.shared if override.split("=")[0] not in values]
        return dataclasses.replace(self, shared=(*kept, *added))


def parse(arguments: Sequence[str]) -> Typed:
    """Splits the task overrides of a search.

    Raises:
        UserError: a sweep over anything but a method's knob.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    narrowed: dict[str, Any] = {}
    shared: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, value = override.key_or_group, override.value()
        if key == "storage":
            continue  # of the search, not of its trials; it may hold a password
        if key == "method":
            if isinstance(value, ChoiceSweep | Glob):
                raise UserError(f"{override.input_line}: list the methods to search over, e.g. method=[wanda,rtn,nf4]")
            continue  # the methods of the space; a trial names its own
        if not key.startswith("method."):
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line}: a search explores the knobs of methods; run one search for each {key}"
                )
            shared.append(str(override.input_line))
        elif isinstance(value, IntervalSweep):
            narrowed[key] = Knob(low=value.start, high=value.end)
        elif isinstance(value, RangeSweep | ChoiceSweep):
            given = tuple(override.sweep_iterator(transformer=lambda v: _plain(v)))
            if not given:
                raise UserError(f"{override.input_line}: no values are left to choose from")
            narrowed[key] = Knob(choices=given)
        elif isinstance(value, Glob) or override.is_delete():
            raise UserError(f"{override.input_line}: give values, e.g. {key}=choice(A,B), or leave it out")
        else:
            narrowed[key] = value
    return Typed(narrowed, tuple(shared))


def _plain(value: Any) -> Any:
    """The value of a choice: unquoted strings as themselves, numbers of a range without what their sums round off."""
    return float(f"{value:.12g}") if isinstance(value, float) else getattr(value, "text", value)


def _of(keys: Iterable[str], overrides: Iterable[str]) -> list[str]:
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in keys]


def command_lines(shared: Sequence[str], strategy: Strategy, folder: Path) -> tuple[str, str]:
    """The `compress.py` and `evaluate.py` lines that make a trial's artifact and its figures again, ready for a shell.

    Args:
        folder: of the trial.
    """
    artifact = folder / "artifact"
    compress = [*_of(COMPRESS_KEYS, shared), *strategy.overrides, f"output={grammar.path(artifact)}"]
    loading = [o for o in _of(("model",), shared) if "." in o.split("=")[0] and not o.startswith("model.path")]
    others = [o for o in _of(EVALUATE_KEYS, shared) if not o.startswith("model")]
    drawn = [f"benchmark.order={grammar.path(folder / ORDER)}"] if (folder / ORDER).is_file() else []
    evaluate = ["model=local", f"model.path={grammar.path(artifact)}", *loading, *others, *drawn]
    return (
        shlex.join(["python", "compress.py", *compress]),
        shlex.join(["python", "evaluate.py", *evaluate]),
    )
