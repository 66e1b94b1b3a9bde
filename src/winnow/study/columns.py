"""Assigns the names under which the storage of a study has the parameters of its trials.

Optuna allows one kind of distribution per name, and one list of choices. The space of a study may change from one start to the
next, so a parameter whose distribution is incompatible with the stored one gets a new name: `slot.quantize`, then
`slot.quantize#2`. winnow reads nothing back from these parameters: they serve optuna-dashboard and other programs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Columns:
    """The parameter names of a study, each with a distribution that was stored under it."""

    def __init__(self) -> None:
        self._stored: dict[str, BaseDistribution] = {}

    def learn(self, distributions: Mapping[str, BaseDistribution]) -> None:
        """Remembers the distributions that a trial was stored with."""
        self._stored.update(distributions)

    def assign(
        self, parameters: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Returns the parameters and their distributions by the names that they can be stored under."""
        values: dict[str, Any] = {}
        stored_distributions: dict[str, BaseDistribution] = {}
        for key, value in parameters.items():
            for number in itertools.count(1):
                name = key if number == 1 else f"{key}#{number}"
                if (distribution := self._storable(name, value, distributions[key])) is not None:
                    values[name], stored_distributions[name] = value, distribution
                    break
        return values, stored_distributions

    def _storable(self, name: str, value: Any, distribution: BaseDistribution) -> BaseDistribution | None:
        """Returns a distribution to store a value with under a name: its own, else the name's; None if neither is possible."""
        from optuna.distributions import check_distribution_compatibility

        stored = self._stored.get(name)
        if stored is None:
            return distribution
        try:
            check_distribution_compatibility(stored, distribution)
        except ValueError:
            return stored if _contains(stored, value) else None
        return distribution


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    """Returns True if a distribution contains a value and restores it unchanged."""
    try:
        internal = distribution.to_internal_repr(value)
        restored = distribution.to_external_repr(internal)
    except (ValueError, TypeError):
        return False
    return bool(distribution._contains(internal)) and type(restored) is type(value) and restored == value
