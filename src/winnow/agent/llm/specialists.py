"""The prompts, as files: `coordinator.md`, `_rules.md` for all who propose, and one file for each specialist.

A specialist's file begins with the slots that are its own and a line that tells the coordinator about it:

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
    name: str
    slots: frozenset[Slot]
    about: str
    prompt: str


@functools.cache
def prompt(name: str) -> str:
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8").strip()


@functools.cache
def specialists() -> tuple[Specialist, ...]:
    """All there are, by name."""
    from omegaconf import DictConfig, OmegaConf

    found = []
    for path in sorted(PROMPTS.glob("*.md")):
        if path.stem in (COORDINATOR, RULES):
            continue
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        about = OmegaConf.create(head)
        assert isinstance(about, DictConfig)
        slots = frozenset(Slot[name.upper()] for name in about["slots"])
        found.append(Specialist(path.stem, slots, about["about"], text.strip()))
    return tuple(found)


def of_space(space: Space) -> tuple[Specialist, ...]:
    """Those with something to choose in a space."""
    slots = {method.slot for method in space.methods}
    return tuple(s for s in specialists() if s.slots & slots)
