"""Under which names the storage of a study has the parameters of its trials.

Optuna takes one kind of distribution a name, and of choices just the same ones. The space of a study may change from one start to
the next, so a parameter whose distribution does not go with the one that its name already has gets a name of its own:
`slot.quantize`, then `slot.quantize#2`. Nothing is read back from these: they are there for optuna-dashboard and other programs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Columns:
    """The names that are taken, each with a distribution that was stored under it."""

    def __init__(self) -> None:
        self._taken: dict[str, BaseDistribution] = {}

    def learn(self, distributions: Mapping[str, BaseDistribution]) -> None:
        """Notes what a trial was stored with."""
        self._taken.update(distributions)

    def of(
        self, parameters: Mapping[str, Any], wanted: Mapping[str, BaseDistribution]
    ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """The parameters and their distributions by the names that they are stored under."""
        values: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for key, value in parameters.items():
            for number in itertools.count(1):
                name = key if number == 1 else f"{key}#{number}"
                if (distribution := self._fitting(name, value, wanted[key])) is not None:
                    values[name], distributions[name] = value, distribution
                    break
        return values, distributions

    def _fitting(self, name: str, value: Any, wanted: BaseDistribution) -> BaseDistribution | None:
        """What a value can be stored with under a name: as wanted, or as the name has it already; None if neither goes."""
        from optuna.distributions import check_distribution_compatibility

        taken = self._taken.get(name)
        if taken is None:
            return wanted
        try:
            check_distribution_compatibility(taken, wanted)
        except ValueError:
            return taken if _holds(taken, value) else None
        return wanted


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has a value, and gives back the same one."""
    try:
        internal = distribution.to_internal_repr(value)
        back = distribution.to_external_repr(internal)
    except (ValueError, TypeError):
        return False
    return bool(distribution._contains(internal)) and type(back) is type(value) and back == value
