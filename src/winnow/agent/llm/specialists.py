"""Loads the prompts from files: `coordinator.md`, `_rules.md` for all specialists, and one file for each specialist.

A specialist's file begins with its slots and a line that describes it to the coordinator:

    ---
    slots: [quantize]
    about: bits and groups
    ---
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from winnow.core.types import Slot
from winnow.study.space import Space

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
COORDINATOR, RULES = "coordinator", "_rules"


@dataclass(frozen=True)
class Specialist:
    """A prompt for the methods of some slots."""

    name: str
    slots: frozenset[Slot]
    about: str
    prompt: str


@functools.cache
def prompt(name: str) -> str:
    """Returns the text of a prompt file."""
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8").strip()


@functools.cache
def specialists() -> tuple[Specialist, ...]:
    """Returns all specialists, sorted by name."""
    import yaml

    loaded = []
    for path in sorted(PROMPTS.glob("*.md")):
        if path.stem in (COORDINATOR, RULES):
            continue
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        about = yaml.safe_load(head)
        slots = frozenset(Slot[name.upper()] for name in about["slots"])
        loaded.append(Specialist(path.stem, slots, about["about"], text.strip()))
    return tuple(loaded)


def of_space(space: Space) -> tuple[Specialist, ...]:
    """Returns the specialists for the slots of a space."""
    slots = {method.slot for method in space.methods}
    return tuple(s for s in specialists() if s.slots & slots)
