"""Parses the command line of `search.py` into the search space and the settings that every trial shares."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.benchmark.order import FILE as ORDER_FILE
from winnow.core import grammar
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.method.knobs import Knob
from winnow.model.lm import LM

COMPRESS_KEYS = ("experiment", "debug", "model", "calibration", "seed", "hardware")
EVALUATE_KEYS = ("experiment", "debug", "model", "benchmark", "hardware", "seed")


@dataclass(frozen=True)
class CommandLine:
    """The command line of a search, parsed.

    Attributes:
        narrowed: settings of methods by key: a fixed value, or a `Knob` with the values to search over.
        shared: overrides of every trial, as typed.
    """

    narrowed: dict[str, Any]
    shared: tuple[str, ...]

    def of_trial(self, strategy: Strategy) -> list[str]:
        """Returns all overrides of one trial's configuration."""
        return [*self.shared, *strategy.overrides]

    def with_model(self, lm: LM) -> CommandLine:
        """Returns the command line with `model.path` and `model.name` of the base model, e.g. of a dequantized GGUF file."""
        values = {"model.path": str(lm.path), "model.name": lm.name}
        model_overrides = [f"{key}={grammar.quoted(text)}" for key, text in values.items()]
        others = [override for override in self.shared if override.split("=")[0] not in values]
        return dataclasses.replace(self, shared=(*others, *model_overrides))


def parse(arguments: Sequence[str]) -> CommandLine:
    """Splits the task overrides of a search into the space and the shared settings.

    Raises:
        UserError: a sweep over anything but the knob of a method.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    narrowed: dict[str, Any] = {}
    shared: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, value = override.key_or_group, override.value()
        if key == "storage":
            continue  # a setting of the search alone; it may hold a password
        if key == "method":
            if isinstance(value, ChoiceSweep | Glob):
                raise UserError(f"{override.input_line}: list the methods to search over, e.g. method=[wanda,rtn,nf4]")
            continue  # names the methods of the space; each trial names its own
        if not key.startswith("method."):
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line}: a search explores the knobs of methods; run one search for each {key}"
                )
            shared.append(str(override.input_line))
        elif isinstance(value, IntervalSweep):
            narrowed[key] = Knob(low=value.start, high=value.end)
        elif isinstance(value, RangeSweep | ChoiceSweep):
            choices = tuple(override.sweep_iterator(transformer=lambda v: _plain(v)))
            if not choices:
                raise UserError(f"{override.input_line}: no values are left to choose from")
            narrowed[key] = Knob(choices=choices)
        elif isinstance(value, Glob) or override.is_delete():
            raise UserError(f"{override.input_line}: give values, e.g. {key}=choice(A,B), or leave it out")
        else:
            narrowed[key] = value
    return CommandLine(narrowed, tuple(shared))


def _plain(value: Any) -> Any:
    """Returns the plain value of a choice: the text of an unquoted string, a number of a range without rounding errors."""
    return float(f"{value:.12g}") if isinstance(value, float) else getattr(value, "text", value)


def _with_keys(keys: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Returns the overrides whose first key is one of `keys`."""
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in keys]


def command_lines(shared: Sequence[str], strategy: Strategy, folder: Path) -> tuple[str, str]:
    """Returns the `compress.py` and `evaluate.py` commands that reproduce a trial's artifact and its figures, quoted for a shell.

    Args:
        folder: the folder of the trial.
    """
    artifact = folder / "artifact"
    compress = [*_with_keys(COMPRESS_KEYS, shared), *strategy.overrides, f"output={grammar.quoted_path(artifact)}"]
    loading = [o for o in _with_keys(("model",), shared) if "." in o.split("=")[0] and not o.startswith("model.path")]
    settings = [o for o in _with_keys(EVALUATE_KEYS, shared) if not o.startswith("model")]
    order_override = (
        [f"benchmark.order={grammar.quoted_path(folder / ORDER_FILE)}"] if (folder / ORDER_FILE).is_file() else []
    )
    evaluate = ["model=local", f"model.path={grammar.quoted_path(artifact)}", *loading, *settings, *order_override]
    return (
        shlex.join(["python", "compress.py", *compress]),
        shlex.join(["python", "evaluate.py", *evaluate]),
    )
